"""Tests that interpolated labels and copied images are detected, and that valid data passes."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dense_jax.data import checks, open_dataset
from dense_jax.labels import IGNORE_LABEL

FACTORS = (0.4, 0.5, 0.9, 1.5, 2.0, 3.0)


@pytest.fixture(scope="module")
def scenes():
    return open_dataset("synthetic", "", "test")


def resized(label: np.ndarray, factor: float, resample: Image.Resampling) -> np.ndarray:
    image = Image.fromarray(label.astype(np.uint8))
    size = (round(image.width * factor), round(image.height * factor))
    return np.asarray(image.resize(size, resample)).astype(np.int32)


def through_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("i", range(4))
def test_drawn_labels_pass(scenes, i):
    label = scenes[i]["label"]
    assert not checks.looks_interpolated(label)
    for factor in FACTORS:
        assert not checks.looks_interpolated(resized(label, factor, Image.Resampling.NEAREST))


@pytest.mark.parametrize("i", range(4))
def test_interpolated_labels_are_found(scenes, i):
    label = scenes[i]["label"] * 2  # as if twice as many classes had been declared
    for factor in FACTORS:
        assert checks.looks_interpolated(resized(label, factor, Image.Resampling.BILINEAR)), factor
        enlarged = resized(
            resized(label, factor, Image.Resampling.BILINEAR), 2.0, Image.Resampling.NEAREST
        )
        assert checks.looks_interpolated(enlarged), factor
    assert checks.looks_interpolated(through_jpeg(label, 90).astype(np.int32))
    # As OpenCV and TensorFlow reduce: without antialiasing.
    points = np.mgrid[: label.shape[0] / 1.5 - 1, : label.shape[1] / 1.5 - 1] * 1.5 + 0.25
    sampled = ndimage.map_coordinates(label.astype(float), points, order=1)
    assert checks.looks_interpolated(sampled.round().astype(np.int32))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 50), (50, 50)])
def test_labels_without_borders_pass(shape):
    assert not checks.looks_interpolated(np.full(shape, IGNORE_LABEL, np.int32))


def test_real_labels_pass_until_they_are_interpolated(real_data):
    source = open_dataset("folder", str(real_data / "camvid"), "val")
    label = np.where((raw := source[7]["label"]) == IGNORE_LABEL, 11, raw)
    assert not checks.looks_interpolated(label)
    for factor in FACTORS:
        assert checks.looks_interpolated(resized(label, factor, Image.Resampling.BILINEAR)), factor
    assert checks.looks_interpolated(through_jpeg(label, 90).astype(np.int32))


def bits_apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.bitwise_count(checks.difference_hash(a) ^ checks.difference_hash(b)))


def test_copies_hash_nearly_alike_and_others_do_not(scenes):
    smooth = ndimage.gaussian_filter(scenes[0]["image"], (3, 3, 0))
    for copy in (
        through_jpeg(smooth, 50),
        smooth[::2, ::2],
        np.repeat(smooth, 2, axis=0),
        smooth // 2,
        smooth.mean(axis=-1, keepdims=True).astype(np.uint8),
    ):
        assert bits_apart(smooth, copy) <= checks.NEAR_BITS
    for i in range(1, 20):
        assert bits_apart(smooth, scenes[i]["image"]) > checks.NEAR_BITS


def test_digest_is_of_pixels_and_shape():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    same = np.ascontiguousarray(image.transpose(1, 0, 2)).transpose(1, 0, 2)
    assert checks.digest(image) == checks.digest(same)
    assert checks.digest(image) != checks.digest(image + 1)
    assert checks.digest(image) != checks.digest(image.reshape(4, 1, 3))


@pytest.mark.parametrize("move", [(0, 0), (2, 0), (0, -1), (0.5, 0), (-0.5, 1.5)])
def test_displacement_is_the_distance_that_images_were_moved(scenes, move):
    strengths = []
    for scene in (scenes[i] for i in range(32)):
        moved = ndimage.shift(scene["image"].astype(float), (*move, 0), order=1, mode="nearest")
        strengths.append(checks.edge_strengths(moved, scene["label"]))
    np.testing.assert_allclose(checks.displacement(np.array(strengths)), move, atol=0.15)


def test_images_without_the_edges_of_labels_are_not_displaced(scenes):
    label = scenes[0]["label"]
    noise = np.random.default_rng(0).normal(size=(*label.shape, 3))
    for there in (label, np.zeros_like(label), np.full_like(label, IGNORE_LABEL)):
        assert checks.displacement(checks.edge_strengths(noise, there)[None]) == (0, 0)
