"""Tests per-pixel targets, such as the border weights from the U-Net paper."""

import itertools
import math
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dense_jax.data import Field, Synthetic, open_dataset
from dense_jax.data.cache import Cached
from dense_jax.data.pipeline import train_batches
from dense_jax.data.targets import (
    WithTarget,
    border_weights,
    signed_distances,
    with_border_weights,
    with_distances,
)
from dense_jax.labels import IGNORE_LABEL, components


def with_borders(source, classes):
    return with_border_weights(source, weight=10.0, sigma=5.0, classes=classes)


def brute_force(objects, weight, sigma):
    """Computes the weights from the distances of every pixel to every pixel of every object."""
    at = np.argwhere(np.ones(objects.shape, bool))
    distances = [
        np.linalg.norm(at[:, None] - np.argwhere(objects == k), axis=-1).min(axis=1)
        for k in np.unique(objects[objects > 0])
    ]
    d1, d2 = np.sort(distances, axis=0)[:2]
    term = weight * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2))
    return np.where(objects == 0, term.reshape(objects.shape), 0)


def blobs(seed, shape=(37, 45), num_objects=9):
    """Returns random rectangles: some touch, some are cut in two, and some numbers are not used."""
    rng = np.random.default_rng(seed)
    objects = np.zeros(shape, np.int32)
    for k in rng.choice(np.arange(1, 300), num_objects, replace=False):
        y, x = (rng.integers(0, length) for length in shape)
        objects[y : y + rng.integers(1, 9), x : x + rng.integers(1, 9)] = k
    return objects


@pytest.mark.parametrize("sigma", [0.7, 2.0, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force(seed, sigma):
    objects = blobs(seed)
    expected = brute_force(objects, 10.0, sigma)
    ours = border_weights(objects, 10.0, sigma)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=10 * 1.6e-8)
    assert ours.dtype == np.float32 and (expected > 1e-3).any()


def test_the_weights_are_those_of_exact_distances_whatever_their_last_bit(monkeypatch):
    """The last bits of OpenCV's distances depend on the processor and on the array's address."""
    objects, transform = blobs(0, (60, 75)), cv2.distanceTransform

    def moved(outside, *options):
        distance = transform(outside, *options)
        return np.nextafter(distance, rng.choice([0, np.inf], distance.shape).astype(np.float32))

    def exact(outside, *_):
        return ndimage.distance_transform_edt(outside).astype(np.float32)

    rng = np.random.default_rng(0)
    weights = [border_weights(objects, 10.0, 5.0)]
    for each in (exact, moved):
        monkeypatch.setattr(cv2, "distanceTransform", each)
        weights.append(border_weights(objects, 10.0, 5.0))
    np.testing.assert_array_equal(weights[1:], [weights[0]] * 2)


@pytest.mark.parametrize("gap", [1, 2, 5])
def test_between_two_squares(gap):
    """In a straight gap d1 + d2 is gap + 1 pixels everywhere, from center to center."""
    objects = np.zeros((20, 20 + gap), np.int32)
    objects[:, 5:10], objects[:, 10 + gap : 15 + gap] = 1, 2
    weights = border_weights(objects, 10.0, 5.0)
    between = weights[:, 10 : 10 + gap]
    np.testing.assert_allclose(between, 10 * math.exp(-((gap + 1) ** 2) / 50), rtol=1e-6)
    assert (weights[objects > 0] == 0).all()
    assert (0 < weights[:, 4]).all() and (weights[:, 4] < between[:, 0]).all()


@pytest.mark.parametrize("num_objects", [0, 1])
def test_nothing_to_separate(num_objects):
    objects = np.zeros((8, 9), np.int32)
    objects[2:4, 2:4] = num_objects
    assert not border_weights(objects, 10.0, 5.0).any()


def test_far_from_both_there_is_nothing():
    objects = np.zeros((3, 100), np.int32)
    objects[1, 0], objects[1, 20], objects[1, 99] = 1, 2, 3
    weights = border_weights(objects, 10.0, 2.0)
    assert not weights[:, 35:].any()
    assert not weights[1, 10:12].any() and not border_weights(objects, 10.0, 1.0).any()


def test_components_are_connected_over_sides_and_never_through_ignored_pixels():
    label = np.array(
        [[1, 1, 0, 2],
         [0, 0, 1, 2],
         [1, 255, 1, 1]], np.int32)  # fmt: skip
    objects = components(label, (1, 2))
    assert set(np.unique(objects)) == {0, 1, 2, 3, 4}
    assert (objects > 0).tolist() == np.isin(label, (1, 2)).tolist()
    assert objects[0, 0] == objects[0, 1] != objects[1, 2] == objects[2, 3]
    assert objects[2, 0] not in (objects[0, 0], objects[1, 2])
    assert objects[0, 3] == objects[1, 3] != objects[1, 2]
    assert not components(label, (IGNORE_LABEL - 1,)).any()


@pytest.fixture
def cells(tmp_path):
    """Two images of three cells; in the second, two of them touch."""
    for name, gap in (("a", 2), ("b", 0)):
        objects = np.zeros((16, 24), np.uint8)
        objects[2:9, 2:8], objects[2:9, 8 + gap : 14], objects[11:15, 4:20] = 7, 9, 200
        for folder, pixels in (
            ("images", objects),
            ("labels", (objects > 0).astype(np.uint8)),
            ("instances", objects),
        ):
            (tmp_path / folder / "train").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / "train" / f"{name}.png")
    (tmp_path / "dataset.json").write_text('{"classes": ["ground", "cell"]}')
    return tmp_path


def test_instances_and_components_agree_until_objects_touch(cells):
    source = open_dataset("folder", str(cells), "train")
    instances = with_borders(source, None)
    connected = with_borders(source, ("cell",))
    apart, touching = zip(instances, connected, strict=True)
    np.testing.assert_array_equal(apart[0]["border"], apart[1]["border"])
    for i, example in enumerate(instances):
        objects = source.instances(i)
        np.testing.assert_array_equal(example["border"], border_weights(objects, 10.0, 5.0))
    # Where they touch they are one component: above them there is no second object near.
    assert touching[0]["border"][1, 8] > 8
    assert touching[1]["border"][1, 8] < 2


def test_ignored_pixels_belong_to_no_instance(cells):
    """Some annotators leave a rim around each object, with a number of its own."""
    path = cells / "instances" / "train" / "a.png"
    objects = np.array(Image.open(path))
    objects[:, 8:10] = 255  # between two cells
    label = np.where(objects == 255, 9, objects > 0).astype(np.uint8)
    Image.fromarray(objects).save(path)
    Image.fromarray(label).save(cells / "labels" / "train" / "a.png")
    (cells / "dataset.json").write_text('{"classes": ["ground", "cell"], "ignored_values": [9]}')
    source = open_dataset("folder", str(cells), "train")
    expected = border_weights(np.where(objects == 255, 0, objects).astype(np.int32), 10.0, 5.0)
    np.testing.assert_array_equal(with_borders(source, None)[0]["border"], expected)


def test_the_examples_are_those_of_the_source(cells):
    source = open_dataset("folder", str(cells), "train")
    bordered = with_borders(source, None)
    assert len(bordered) == len(source) and (bordered.sizes == source.sizes).all()
    copy = pickle.loads(pickle.dumps(bordered))
    for example, other, plain in zip(bordered, copy, source, strict=True):
        assert example.keys() == plain.keys() | {"border"}
        for key in plain:
            np.testing.assert_array_equal(example[key], plain[key])
        np.testing.assert_array_equal(example["border"], other["border"])


def test_what_the_objects_are_must_be_known():
    source = Synthetic("", "val")
    with pytest.raises(ValueError, match=r"not set and .* no instance files: .* of background, di"):
        with_borders(source, None)
    with pytest.raises(ValueError, match=r"border\.classes: no class cell; there are: backg"):
        with_borders(source, ("disk", "cell"))


def brute_force_distances(label, num_classes):
    """Signed distances from the distances of every pixel to every pixel."""
    at = np.argwhere(np.ones(label.shape, bool))
    apart = np.linalg.norm(at[:, None] - at, axis=-1)
    valid, maps = label.ravel() != IGNORE_LABEL, []
    for k in range(num_classes):
        inside = label.ravel() == k
        others = valid & ~inside
        if inside.any() and others.any():
            to_others = apart[:, others].min(axis=1)
            maps.append(np.where(inside, 1 - to_others, apart[:, inside].min(axis=1)))
        else:
            maps.append(np.zeros(label.size))
    return np.stack(maps, axis=-1).reshape(*label.shape, num_classes)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_signed_distances_equal_brute_force(dtype):
    label = (blobs(1) % 3).astype(dtype)  # class 3 is absent
    label[5:9, 10:30] = IGNORE_LABEL
    distances = signed_distances(label, 4)
    assert distances.dtype == np.float16
    np.testing.assert_allclose(distances, brute_force_distances(label, 4), rtol=1e-3)
    assert not signed_distances(np.where(label == 0, 0, IGNORE_LABEL), 4).any()


def test_the_distances_are_0_at_the_boundary_and_do_not_end_at_ignored_pixels():
    label = np.array([[0, 0, 0, 1, 1, 255, 255, 255]], np.int32)
    inside, outside = signed_distances(label, 2)[0].T[[1, 0]]
    np.testing.assert_array_equal(inside[:5], [3, 2, 1, 0, -1])
    np.testing.assert_array_equal(outside[:5], [-2, -1, 0, 1, 2])


def test_distances_go_through_cache_and_canvas_beside_the_border(cells):
    source = open_dataset("folder", str(cells), "train")
    cached = Cached(with_distances(with_borders(source, None), 2))
    copy = pickle.loads(pickle.dumps(cached))
    (batch,) = itertools.islice(train_batches(copy, canvas=(20, 20), seed=0, batch_size=2), 1)
    assert batch["distances"].shape == (2, 20, 20, 2) and batch["distances"].dtype == np.float16
    assert not batch["distances"][:, 16:].any() and batch["border"].any()
    label, distances = batch["label"][:, :16], batch["distances"][:, :16]
    np.testing.assert_array_equal(distances[..., 1] <= 0, label == 1)
    np.testing.assert_array_equal(distances[..., 0] <= 0, label == 0)


def distance_map(i, example):
    """The distance of each pixel to the nearest pixel of class 0, in pixels."""
    return ndimage.distance_transform_edt(example["label"]).astype(np.float16)


def test_another_target_is_a_function_and_a_line(cells):
    """No other code names it: it is cached, pickled, put onto a canvas and batched."""
    source = open_dataset("folder", str(cells), "train")
    field = Field("distance", dtype="float16", fill=-1.0)
    target = WithTarget(with_borders(source, None), field, distance_map)
    assert target.fields == (Field("border"), field)
    cached = Cached(target)
    copy = pickle.loads(pickle.dumps(cached))
    (batch,) = itertools.islice(train_batches(copy, canvas=(20, 20), seed=0, batch_size=2), 1)
    assert batch["distance"].dtype == np.float16 and batch["border"].dtype == np.float32
    assert (batch["distance"][:, 16:] == -1).all() and (batch["border"][:, 16:] == 0).all()
    label, distance = batch["label"][:, :16], batch["distance"][:, :16]
    np.testing.assert_array_equal(distance > 0, label > 0)
    assert distance.max() >= 3  # in the middle of a cell
