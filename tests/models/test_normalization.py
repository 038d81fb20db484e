"""Tests how the bytes of an image are normalized for the network."""

import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.models.normalization import NORMALIZATIONS


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_bytes_become_floats_of_a_shape_that_does_not_depend_on_them(name):
    image = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    seen = NORMALIZATIONS[name](jnp.asarray(image))
    assert seen.shape == image.shape and seen.dtype == jnp.float32
    # A crop that was resampled, in floats, is normalized alike.
    np.testing.assert_array_equal(seen, NORMALIZATIONS[name](jnp.asarray(image, jnp.float32)))


def test_unit_maps_bytes_to_minus_2_to_2():
    image = jnp.array([[0, 255]], jnp.uint8)
    np.testing.assert_allclose(NORMALIZATIONS["unit"](image), [[-2, 2]])


def test_imagenet_standardizes_each_channel():
    image = np.array([[10, 20, 30]], np.uint8)
    expected = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(NORMALIZATIONS["imagenet"](jnp.asarray(image)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["imagenet", "inception"])
def test_gray_images_become_three_channels_for_published_weights(name):
    gray = jnp.array([[[7]], [[200]]], jnp.uint8)
    rgb = jnp.repeat(gray, 3, axis=-1)
    np.testing.assert_array_equal(NORMALIZATIONS[name](gray), NORMALIZATIONS[name](rgb))


@pytest.mark.parametrize("channels", [2, 5, 12])
def test_channels_beyond_rgb_are_normalized_like_r_g_and_b_in_turn(channels):
    image = np.random.default_rng(0).integers(0, 256, (4, channels), np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = [(image[:, i] / 255 - mean[i % 3]) / std[i % 3] for i in range(channels)]
    seen = NORMALIZATIONS["imagenet"](jnp.asarray(image))
    np.testing.assert_allclose(seen, np.transpose(expected), rtol=1e-4)


def test_local_response_equals_a_loop_over_five_channels():
    """Caffe's LRN with local_size 5, alpha 1e-4 and beta 0.75, as in SegNet-Basic's prototxt."""
    image = np.random.default_rng(0).integers(0, 256, (6, 3), np.uint8)
    expected = np.zeros(image.shape)
    for i, c in np.ndindex(image.shape):
        near = [float(image[i, k]) for k in range(c - 2, c + 3) if 0 <= k < 3]
        expected[i, c] = image[i, c] / (1 + 1e-4 / 5 * sum(x * x for x in near)) ** 0.75
    np.testing.assert_allclose(
        NORMALIZATIONS["local_response"](jnp.asarray(image)), expected, rtol=1e-5
    )
