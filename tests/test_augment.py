"""Properties of the one resample: labels are never made up, image and label stay together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.augment import make_augment, mirror, sample_bilinear
from dense_jax.labels import IGNORE_LABEL

H, W = 12, 10


def example(seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, (H, W), np.uint8)
    label[2, 3:6] = IGNORE_LABEL
    return jnp.asarray(rng.integers(0, 256, (H, W, 3), np.uint8)), jnp.asarray(label)


def run(augment, key, image, label, size=(H, W)):
    crop = augment(jax.random.key(key), {"image": image, "label": label, "size": jnp.array(size)})
    assert crop.keys() == {"image", "label"}
    return crop["image"], crop["label"]


def test_zero_strength_is_the_identity_bitwise():
    image, label = example()
    new_image, new_label = run(make_augment((H, W)), 0, image, label)
    np.testing.assert_array_equal(new_image, image)
    np.testing.assert_array_equal(new_label, label)


def test_flips_are_exact_permutations():
    image, label = example()
    for flips, axes in (({"flip": 1.0}, 1), ({"flip_vertical": 1.0}, 0)):
        new_image, new_label = run(make_augment((H, W), **flips), 0, image, label)
        np.testing.assert_array_equal(new_image, np.flip(image, axes))
        np.testing.assert_array_equal(new_label, np.flip(label, axes))


def test_flip_probability_is_a_probability():
    image, label = example()
    augment = make_augment((H, W), flip=0.25)
    keys = jax.vmap(jax.random.key)(jnp.arange(400))
    there = {"image": image, "label": label, "size": jnp.array([H, W])}
    images = jax.vmap(lambda key: augment(key, there)["image"])(keys)
    flipped = np.mean(np.all(np.asarray(images) == np.flip(np.asarray(image), 1), axis=(1, 2, 3)))
    assert 0.18 < flipped < 0.32


def test_crops_are_windows_of_the_image_and_reach_every_position():
    image, label = map(np.asarray, example())
    augment = jax.jit(make_augment((5, 4)))
    seen = set()
    for key in range(200):
        new_image, new_label = map(np.asarray, run(augment, key, image, label))
        places = [
            (y, x)
            for y in range(H - 4)
            for x in range(W - 3)
            if np.array_equal(image[y : y + 5, x : x + 4], new_image)
            and np.array_equal(label[y : y + 5, x : x + 4], new_label)
        ]
        assert len(places) == 1
        seen |= set(places)
    ys, xs = zip(*seen, strict=True)
    assert (min(ys), max(ys), min(xs), max(xs)) == (0, H - 5, 0, W - 4)


def test_a_small_image_is_whole_inside_the_crop_and_ignored_around():
    image, label = example()
    augment = jax.jit(make_augment((H, W)))
    for key in range(20):
        _, new_label = run(augment, key, image, label, size=(4, 3))
        assert np.sum(np.asarray(new_label) == IGNORE_LABEL) == H * W - np.sum(
            np.asarray(label[:4, :3]) != IGNORE_LABEL
        )


@pytest.mark.parametrize("key", range(5))
def test_labels_are_never_made_up_and_follow_the_image(key):
    """The image shows each label's own value, so that a shift of more than half a pixel shows."""
    label = jnp.asarray(np.kron([[10, 60], [110, 160]], np.ones((H // 2, W // 2))).astype(np.uint8))
    image = label[..., None].repeat(3, axis=-1)
    augment = make_augment((9, 9), flip=0.5, flip_vertical=0.5, scale=1.0)
    new_image, new_label = run(augment, key, image, label)
    assert set(np.unique(new_label)) <= {10, 60, 110, 160, IGNORE_LABEL}
    inside = np.asarray(new_label) != IGNORE_LABEL
    grey = np.asarray(new_image[..., 0])
    flat = inside & np.isin(grey, [10, 60, 110, 160])  # no edge between the four pixels read
    np.testing.assert_array_equal(grey[flat], np.asarray(new_label)[flat])
    assert flat.sum() >= 15


def test_half_resolution_averages_two_by_two():
    image, label = example()
    new_image, _ = run(make_augment((H // 2, W // 2), resolution=0.5), 0, image, label)
    blocks = np.asarray(image, np.float32).reshape(H // 2, 2, W // 2, 2, 3)
    np.testing.assert_allclose(new_image, blocks.mean(axis=(1, 3)), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_mirror_is_numpys_reflect_padding(size):
    positions = jnp.arange(-7, size + 7, dtype=jnp.float32)[None]
    expected = np.pad(np.arange(size), 7, mode="reflect")
    np.testing.assert_array_equal(mirror(positions, jnp.array(size))[0], expected)


def test_sampling_at_the_last_pixel_stays_inside():
    image, _ = example()
    at = jnp.full((1, 1), H - 1.0), jnp.full((1, 1), W - 1.0)
    np.testing.assert_array_equal(sample_bilinear(image, at)[0, 0], image[-1, -1])


@pytest.mark.parametrize(
    "options", [{}, {"flip": 1.0, "flip_vertical": 1.0, "scale": 0.5}], ids=str
)
def test_context_is_added_around_the_very_same_crop(options):
    """The labelled window is chosen as without it: the border of an image is trained on too."""
    image, label = example()
    without = run(make_augment((5, 4), **options), 3, image, label)
    new_image, new_label = run(make_augment((5, 4), context=6, **options), 3, image, label)
    assert new_image.shape == (5 + 12, 4 + 12, 3)
    np.testing.assert_array_equal(new_label, without[1])
    np.testing.assert_allclose(new_image[6:-6, 6:-6], without[0], rtol=1e-5)


def test_context_beyond_the_image_is_mirrored():
    image, label = example()
    new_image, _ = run(make_augment((H, W), context=3), 0, image, label)
    np.testing.assert_array_equal(
        new_image, np.pad(image, ((3, 3), (3, 3), (0, 0)), mode="reflect")
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"flip": 1.0}, {"flip_vertical": 1.0}, {"flip": 0.5, "scale": 1.0}, {"context": 3}],
    ids=str,
)
def test_border_weights_move_with_the_label_and_are_0_outside(options):
    """Both show the number of their pixel."""
    numbers = jnp.arange(H * W, dtype=jnp.uint8).reshape(H, W)
    image, _ = example()
    there = {"image": image, "label": numbers, "border": numbers.astype(jnp.float32)}
    for size in ((H, W), (7, 6)):
        crop = make_augment((H, W), **options)(jax.random.key(4), there | {"size": jnp.array(size)})
        outside = np.asarray(crop["label"]) == IGNORE_LABEL
        assert crop["border"].dtype == jnp.float32 and outside.any() == (size != (H, W))
        np.testing.assert_array_equal(crop["border"], np.where(outside, 0, crop["label"]))
