"""Tests which values of an image become black and white, and that they are the same everywhere."""

import itertools
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.data import Synthetic, cache, levels, pipeline
from dense_jax.data.source import Source
from dense_jax.models.normalization import NORMALIZATIONS, to_gray_levels

RNG = np.random.default_rng(0)
FACTS = {"num_channels": 2, "dtype": "uint16", "value_range": None, "levels": None}


def an_image(height=12, width=9, dtype="uint16"):
    return (RNG.gamma(2, 3000, (height, width, 2)) + 50).astype(dtype)


def levels_of(normalization, image, **facts):
    facts = FACTS | {"dtype": image.dtype.name} | facts
    rule = levels.rule(normalization, facts)
    return rule([image], image.shape[:2])


def seen(normalization, image, **facts):
    """Returns what the network sees of an image."""
    found = levels_of(normalization, image, **facts)
    gray = to_gray_levels(jnp.asarray(image), jnp.asarray(found))
    return np.asarray(NORMALIZATIONS[normalization](gray), np.float64)


class Arrays(Source):
    """Images in memory, like those of files if they have a fingerprint."""

    fingerprint = None

    def __init__(self, images):
        self.images, self.num_channels, self.dtype = images, 2, images[0].dtype.name

    @property
    def sizes(self):
        return np.array([image.shape[:2] for image in self.images], np.int32)

    @property
    def names(self):
        return tuple(map(str, range(len(self))))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        label = np.zeros(self.images[i].shape[:2], np.int32)
        return {"image": self.images[i], "label": label, "name": str(i)}


def test_every_measured_normalization_has_a_function_on_the_device():
    assert set(levels.MEASURED) < set(NORMALIZATIONS)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_image_is_the_z_score(dtype):
    image = an_image(dtype=dtype)
    values = image.astype(np.float64)
    expected = (values - values.mean((0, 1))) / values.std((0, 1))
    np.testing.assert_allclose(seen("image", image), expected, atol=1e-5)


@pytest.mark.parametrize("scale, shift", [(10.0, 0.0), (1e-3, -0.7)])
@pytest.mark.parametrize("name", levels.PER_IMAGE)
def test_exposure_does_not_matter(name, scale, shift):
    image = an_image(dtype="float32")
    other = scale * image + np.float32(shift)
    np.testing.assert_allclose(seen(name, other), seen(name, image), atol=1e-3)


def test_percentiles_become_black_and_white():
    image = np.arange(101, dtype=np.uint16)[:, None, None] * np.array([[[1, 300]]], np.uint16)
    np.testing.assert_allclose(levels_of("percentiles", image), [[1, 300], [99, 29700]])


def test_the_range_becomes_black_and_white():
    found = levels_of("unit", an_image(), value_range=(100, 4095))
    np.testing.assert_array_equal(found, [[100, 100], [4095, 4095]])


def test_8_bits_need_no_levels():
    for name in NORMALIZATIONS:
        is_measured = name in levels.MEASURED
        assert levels.are_needed(name, "uint8") == is_measured
        assert levels.are_needed(name, "uint16") and levels.are_needed(name, "float32")
        if not is_measured:
            facts = FACTS | {"dtype": "uint8", "value_range": (3, 8)}
            assert levels.rule(name, facts) is None


def test_a_missing_range_is_an_error_with_two_ways_out():
    with pytest.raises(ValueError, match=r"uint16 .*'unit'.*\"range\".*normalization=percentiles"):
        levels.rule("unit", FACTS)


@pytest.mark.parametrize("value", [0, 1, 200, 60000])
@pytest.mark.parametrize("name", levels.PER_IMAGE)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_constant_images_stay_finite(name, value, dtype):
    image = np.full((5, 4, 2), value % 256 if dtype == "uint8" else value, dtype)
    middle = 0.0  # the middle of black and white
    np.testing.assert_allclose(seen(name, image), middle, atol=0.5)
    image[0, 0, 0] += 1  # nothing explodes because of a single pixel
    assert np.abs(seen(name, image)).max() < 520


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e30])
@pytest.mark.parametrize("name", levels.PER_IMAGE)
def test_rare_bright_pixels_stay_finite(name, scale):
    image = np.zeros((100, 100, 2), np.float32)
    image[3, 4] = scale
    found = seen(name, image)
    assert np.isfinite(found).all() and np.abs(found).max() < 1100


@pytest.mark.parametrize(
    "facts, floor", [({"dtype": "uint8"}, 1.0), ({"value_range": (0, 510)}, 2.0)]
)
def test_the_floor_is_a_gray_level(facts, floor):
    image = np.full((8, 8, 2), 100, facts.get("dtype", "uint16"))
    low, high = levels_of("image", image, **facts)
    np.testing.assert_allclose(high - low, 4 * floor)
    low, high = levels_of("percentiles", image, **facts)
    np.testing.assert_allclose(high - low, floor)
    np.testing.assert_allclose(low + high, 200)


@pytest.mark.parametrize("size", [(1, 1), (7, 40), (40, 7), (1, 900), (30, 30), (61, 57)])
@pytest.mark.parametrize("name", levels.PER_IMAGE)
def test_strips_have_the_levels_of_the_whole_image(monkeypatch, name, size):
    monkeypatch.setattr(levels, "MAX_SAMPLES", 200)
    image = an_image(*size)
    expected = levels_of(name, image)
    k = next(k for k in itertools.count(1) if image[::k, ::k, 0].size <= 200)
    np.testing.assert_array_equal(levels_of(name, image[::k, ::k]), expected)
    rule = levels.rule(name, FACTS)
    for rows in (1, 4, 11, 100):

        def strips(rows=rows):
            return iter([image[y : y + rows] for y in range(0, len(image), rows)])

        found, parts = rule.read(strips, size)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.concatenate(list(parts)), image)
    turned = np.asfortranarray(image)  # another order in memory
    np.testing.assert_array_equal(levels_of(name, turned), expected)


def test_an_image_in_one_strip_is_read_once():
    image, opened = an_image(), []

    def strips():
        opened.append(1)
        return iter([image])

    levels.rule("image", FACTS).read(strips, image.shape[:2])
    assert len(opened) == 1


def test_a_split_has_the_levels_of_all_its_pixels():
    images = [an_image(*size) for size in ((12, 9), (3, 30), (20, 20))]
    pixels = np.concatenate([image.reshape(-1, 2) for image in images]).astype(np.float64)
    low, high = levels.of_split(Arrays(images))
    np.testing.assert_allclose((low + high) / 2, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose((high - low) / 4, pixels.std(0), rtol=1e-5)


def test_the_levels_of_a_split_are_measured_once(monkeypatch):
    source = Arrays([an_image()])
    monkeypatch.setattr(source, "fingerprint", "abc")
    expected = levels.of_split(source)
    monkeypatch.setattr(Arrays, "__getitem__", None)
    np.testing.assert_array_equal(levels.of_split(source), expected)
    dataset = FACTS | {"levels": expected.tolist()}  # as JSON has it
    np.testing.assert_array_equal(levels.rule("dataset", dataset)([], (1, 1)), expected)


@pytest.mark.parametrize("name", [*levels.PER_IMAGE, "unit"])
def test_padding_and_crops_leave_levels_alone(name):
    images = [an_image(*size) for size in ((12, 9), (30, 5), (4, 4))]
    rule = levels.rule(name, FACTS | {"value_range": (0, 4095)})
    cached = cache.Cached(levels.with_levels(Arrays(images), rule))
    source = pickle.loads(pickle.dumps(cached))  # as a worker has it
    assert source.has_levels and source.dtype == "uint16"
    batches = pipeline.train_batches(source, canvas=(8, 8), seed=0, batch_size=6)
    batch = next(batches)
    batches.close()
    assert batch["image"].dtype == np.uint16 and batch["levels"].dtype == np.float32
    for i, found in zip(batch["name"], batch["levels"], strict=True):
        image = images[int(i)]
        np.testing.assert_array_equal(found, rule([image], image.shape[:2]))


def test_sources_of_8_bits_are_not_wrapped():
    source = Synthetic("", "val")
    assert levels.with_levels(source, None) is source and not source.has_levels


def test_pictures_show_8_bits_as_they_are_and_others_by_their_levels():
    small = an_image(dtype="uint8")
    assert levels.picture(small, value_range=(3, 9), levels=levels_of("image", small)) is small
    image = np.array([[[0], [100], [2000], [5000]]], np.uint16)
    shown = levels.picture(image, value_range=(100, 3900))
    np.testing.assert_array_equal(shown[0, :, 0], [0, 0, 128, 255])
    shown = levels.picture(image, levels=np.array([[0], [5000]], np.float32))
    np.testing.assert_array_equal(shown[0, :, 0], [0, 5, 102, 255])
    assert levels.picture(image)[0, ::3, 0].tolist() == [0, 255]
