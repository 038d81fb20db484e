"""Tests which pixels class-aware crops show, and which pixels ClassMix moves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dense_jax.data import Field
from dense_jax.devices import mesh
from dense_jax.labels import IGNORE_LABEL
from dense_jax.training.augment import augment, augment_batch
from dense_jax.training.class_aware import mix_classes
from tests.conftest import mesh_of

CROP = (6, 4)


def labels_of(label, num_keys, *, size=None, crop_size=CROP, num_classes=3, **options):
    """The labels of crops of one example, one for each key. The image shows each pixel's place."""
    image = np.stack(np.indices(label.shape), axis=-1).astype(np.uint8)
    there = {"image": image, "label": label, "size": np.array(size or label.shape, np.int32)}
    crop = partial(augment, crop_size=crop_size, num_classes=num_classes, **options)
    keys = jax.random.split(jax.random.key(0), num_keys)
    crops = jax.jit(jax.vmap(crop, in_axes=(0, None)))(keys, jax.tree.map(jnp.asarray, there))
    return jax.tree.map(np.asarray, crops)


def one_pixel(place, size=20):
    label = np.full((size, size), IGNORE_LABEL, np.uint8)
    label[place] = 1
    return label


@pytest.mark.parametrize(
    "options",
    [{}, {"flip": 0.5, "flip_vertical": 0.5}, {"resolution": 0.5}, {"context": 3}],
    ids=str,
)
def test_the_chosen_pixel_is_anywhere_in_the_crop(options):
    """All other pixels are ignored, so no crop is drawn around them."""
    size = 40 if options == {"resolution": 0.5} else 20
    label = one_pixel((size // 2, size // 2 - 1), size)
    shown = labels_of(label, 2400, class_crop=1.0, **options)["label"] == 1
    assert np.all(shown.sum(axis=(1, 2)) == 1)
    assert stats.chisquare(shown.sum(axis=0).ravel()).pvalue > 0.01


@pytest.mark.parametrize("place", [(1, 2), (19, 17), (18, 0)])
def test_close_to_the_border_all_windows_inside_the_image_are_equally_likely(place):
    image = labels_of(one_pixel(place), 1200, class_crop=1.0)["image"]
    starts, counts = np.unique(image[:, 0, 0], axis=0, return_counts=True)
    rows, columns = (
        range(max(0, n - length + 1), min(n, 20 - length) + 1)
        for n, length in zip(place, CROP, strict=True)
    )
    expected = [[y, x] for y in rows for x in columns]
    np.testing.assert_array_equal(starts, expected)
    assert stats.chisquare(counts).pvalue > 0.01


def test_each_class_gets_an_equal_share_of_the_aimed_crops():
    """Two classes of one pixel each, and one of all others."""
    label = np.zeros((50, 50), np.uint8)
    label[12, 12], label[37, 37] = 1, 2
    probability, by_chance = 0.6, np.prod(CROP) / np.prod([50 - n + 1 for n in CROP])
    labels = labels_of(label, 4000, class_crop=probability)["label"]
    for rare in (1, 2):
        shown = np.sum(np.any(labels == rare, axis=(1, 2)))
        aimed = probability / 3
        assert stats.binomtest(shown, 4000, aimed + (1 - aimed) * by_chance).pvalue > 0.01


def test_scaled_rotated_and_deformed_crops_show_the_chosen_class():
    """A square of 2 x 2 pixels, because the nearest pixel may be another one."""
    label = one_pixel((slice(20, 22), slice(20, 22)), 40)
    options = {"scale": 0.5, "rotation": 180.0, "shear": 10.0, "elastic": 0.5}
    labels = labels_of(label, 400, class_crop=1.0, **options)["label"]
    assert np.mean(np.any(labels == 1, axis=(1, 2))) > 0.98


def test_without_a_class_images_are_cropped_as_usual():
    label = np.full((20, 20), IGNORE_LABEL, np.uint8)
    usual, aimed = (labels_of(label, 5, class_crop=p) for p in (0.0, 1.0))
    jax.tree.map(np.testing.assert_array_equal, usual, aimed)


def test_a_pixel_that_no_window_shows_leaves_the_crop_as_usual():
    """Windows that are as large as the image cannot move, and rotated ones do not show its corners."""
    options = {"crop_size": (20, 20), "rotation": 45.0}
    usual, aimed = (labels_of(one_pixel((0, 0)), 50, class_crop=p, **options) for p in (0.0, 1.0))
    is_shown = np.any(aimed["label"] == 1, axis=(1, 2))
    assert not is_shown.all()
    np.testing.assert_allclose(aimed["image"][~is_shown], usual["image"][~is_shown], atol=1e-4)


def test_a_small_image_is_inside_the_crop():
    label = one_pixel((2, 3))
    label[0, 0] = 2
    labels = labels_of(label, 200, size=(3, 4), crop_size=(8, 8), class_crop=1.0)["label"]
    assert np.all(np.sum(labels == 1, axis=(1, 2)) == 1)
    assert np.all(np.sum(labels == 2, axis=(1, 2)) == 1)


CONTEXT = 2


def crops(num_crops, num_classes=5, size=12, seed=0):
    """Crops whose arrays tell the number of the crop and the class of the pixel."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, num_classes, (num_crops, 4, 4)).repeat(3, 1).repeat(3, 2)
    label[:, :2, :5] = IGNORE_LABEL
    for n in range(num_crops):  # of some crops, few classes
        label[n][label[n] < IGNORE_LABEL] %= n % num_classes + 1
    value = 1000 * np.arange(num_crops)[:, None, None] + label
    around = ((0, 0), (CONTEXT, CONTEXT), (CONTEXT, CONTEXT))
    image = np.pad(value, around, constant_values=-1)[..., None].repeat(3, -1)
    arrays = {"image": image.astype(np.float32), "label": label.astype(np.int32)}
    pair = np.stack([value, -value], axis=-1).astype(np.float32)
    return arrays | {"border": value.astype(np.float32), "pair": pair}


def test_whole_classes_move_with_all_that_belongs_to_them():
    there = crops(10)
    mix = jax.jit(partial(mix_classes, probability=1.0, num_classes=5))
    drawn = {}
    for key in range(30):
        mixed = mix(jax.random.split(jax.random.key(key), 10), there)
        mixed = jax.tree.map(np.asarray, mixed)
        for n in range(10):
            following = there["label"][(n + 1) % 10]
            present = set(np.unique(following)) - {IGNORE_LABEL}
            pasted = mixed["border"][n] // 1000 != n
            classes = set(np.unique(following[pasted]))
            assert classes <= present and len(classes) == len(present) // 2
            drawn.setdefault(n, set()).add(frozenset(classes))
            np.testing.assert_array_equal(pasted, np.isin(following, list(classes)))
            source = np.where(pasted, (n + 1) % 10, n)
            label = np.choose(pasted, [there["label"][n], following])
            np.testing.assert_array_equal(mixed["label"][n], label)
            value = 1000 * source + label
            np.testing.assert_array_equal(mixed["border"][n], value)
            np.testing.assert_array_equal(mixed["pair"][n], np.stack([value, -value], axis=-1))
            image = np.pad(value, CONTEXT, constant_values=-1)[..., None].repeat(3, -1)
            np.testing.assert_array_equal(mixed["image"][n], image)
    # All pairs of the 5 classes of crop 4 are drawn.
    assert len(drawn[3]) == 10


def test_the_probability_of_mixing_is_a_probability():
    there = crops(400)
    mix = jax.jit(partial(mix_classes, probability=0.3, num_classes=5))
    mixed = mix(jax.random.split(jax.random.key(0), 400), there)
    present = [set(np.unique(label)) - {IGNORE_LABEL} for label in there["label"]]
    able = [n for n in range(400) if len(present[(n + 1) % 400]) > 1]
    changed = [np.any(mixed["label"][n] != there["label"][n]) for n in able]
    assert len(able) > 250 and 0.23 < np.mean(changed) < 0.37


def test_on_any_devices_the_same_crops_are_mixed():
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 12, 12, 3), np.uint8),
        "label": rng.integers(0, 3, (8, 12, 12)).astype(np.uint8),
        "border": rng.uniform(0, 1, (8, 12, 12)).astype(np.float32),
        "size": np.full((8, 2), 12, np.int32),
    }
    options = {"crop_size": (8, 8), "flip": 0.5, "class_crop": 0.5, "fields": [Field("border")]}
    keys = jax.random.split(jax.random.key(0), 8)
    plain, expected, *others = (
        jax.jit(partial(augment_batch, num_classes=3, class_mix=probability, **options))(
            *jax.device_put((keys, batch), mesh.sharded(mesh_of(num_devices)))
        )
        for probability, num_devices in ((0.0, 1), (0.7, 1), (0.7, 2), (0.7, 4))
    )
    assert np.any(plain["label"] != expected["label"])
    for mixed in others:
        jax.tree.map(np.testing.assert_array_equal, mixed, expected)
