"""Tests each color change against other libraries, and the distribution of random amounts."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage, stats

from dense_jax.training.color_jitter import COLORS, change_colors

H, W = 11, 16
NUM_KEYS = 1000


def random_image(channels=3):
    return np.random.default_rng(0).integers(0, 256, (H, W, channels)).astype(np.float32)


def change(name, strength, image):
    """What many keys make of one image."""
    color = jax.jit(
        jax.vmap(functools.partial(change_colors, strengths={name: strength}), in_axes=(0, None))
    )
    keys = jax.random.split(jax.random.key(0), NUM_KEYS)
    return np.asarray(color(keys, jnp.asarray(image, jnp.float32)), np.float64)


def constant(*color):
    return np.broadcast_to(np.array(color), (H, W, len(color)))


def where(columns, yes, no):
    return np.broadcast_to(np.where(columns, yes, no)[None, :, None], (H, W, 1))


def blur_of_a_column(image):
    """From how much of it is in the next one; where that is nothing, the blur is none."""
    center, neighbor = image[0, W // 2, 0], max(image[0, W // 2 + 1, 0], 1e-30)
    return (2 * np.log(center / neighbor)) ** -0.5


X = np.arange(W)
# Strength; an image that tells by how much it was changed; that amount; its range.
AMOUNTS = {
    "brightness": (0.5, constant(100), lambda x: x[0, 0, 0] / 100, (0.5, 1.5)),
    "contrast": (0.5, where(W // 2 > X, 80, 120), lambda x: x[0, -1, 0] / 20 - 5, (0.5, 1.5)),
    "saturation": (0.5, constant(130, 100, 100), lambda x: np.ptp(x[0, 0]) / 30, (0.5, 1.5)),
    "hue": (
        *(60.0, constant(100, 200, 100)),
        lambda x: 360 * colorsys.rgb_to_hsv(*x[0, 0])[0] - 120,
        (-60, 60),
    ),
    "gamma": (
        *(1.0, constant(64)),
        lambda x: np.log2(np.log(x[0, 0, 0] / 255) / np.log(64 / 255)),
        (-1, 1),
    ),
    "blur": (1.5, where(W // 2 == X, 255, 0), blur_of_a_column, (0, 1.5)),
    "noise": (20.0, constant(128), np.std, (0, 20)),
    "offset": (50.0, constant(128), lambda x: x.mean() - 128, (-50, 50)),
}


@functools.cache
def amounts(name):
    """By how much each key changes any image."""
    strength, image, tell, _ = AMOUNTS[name]
    return np.array([tell(each) for each in change(name, strength, image)])


@pytest.mark.parametrize("name", COLORS)
def test_amounts_are_uniform_in_their_range(name):
    quantiles = np.linspace(*AMOUNTS[name][-1], NUM_KEYS)
    error = np.abs(np.sort(amounts(name)) - quantiles).max() / np.ptp(quantiles)
    assert error < 0.1


def test_noise_is_gaussian_and_another_at_each_value():
    noise = change("noise", 20.0, constant(128, 128, 128))[amounts("noise") > 1] - 128
    noise /= noise.std(axis=(1, 2, 3), keepdims=True)
    assert stats.kstest(noise.ravel(), stats.norm.cdf).statistic < 0.005
    values = noise.reshape(len(noise), -1)
    assert np.abs(values.T @ values / len(noise) - np.eye(values.shape[1])).max() < 0.3


def enhanced(enhancer, image, factor):
    return np.asarray(enhancer(Image.fromarray(image.astype(np.uint8))).enhance(factor), np.float64)


def turned(image, degrees):
    """Pixel by pixel, by Python's own colorsys."""
    out = []
    for rgb in image.reshape(-1, 3) / 255:
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        out.append(colorsys.hsv_to_rgb((h + degrees / 360) % 1, s, v))
    return 255 * np.reshape(out, image.shape)


REFERENCES = {
    # Pillow rounds to whole gray levels, and contrast's mean too.
    "brightness": (functools.partial(enhanced, ImageEnhance.Brightness), 1.01),
    "contrast": (functools.partial(enhanced, ImageEnhance.Contrast), 1.51),
    "saturation": (functools.partial(enhanced, ImageEnhance.Color), 1.51),
    "hue": (turned, 1e-2),
    "gamma": (lambda image, g: 255 * (image / 255) ** (2**g), 1e-2),
    "blur": (
        lambda image, sigma: ndimage.gaussian_filter(
            image.astype(np.float64), (sigma, sigma, 0), mode="mirror", radius=(5, 5, 0)
        ),
        1e-1,
    ),
    "offset": (lambda image, d: (image + d).clip(0, 255), 1e-3),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_changes_are_those_of_other_libraries(name):
    reference, tolerance = REFERENCES[name]
    image = random_image()
    ours = change(name, AMOUNTS[name][0], image)
    for amount, each in list(zip(amounts(name), ours, strict=True))[:20]:
        np.testing.assert_allclose(each, reference(image, amount), atol=tolerance)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels_stays_in_range_and_gray_stays_gray(channels):
    strengths = {"brightness": 1.0, "contrast": 1.0, "gamma": 1.0, "blur": 2.0}
    gray = np.repeat(random_image(1), channels, axis=-1)
    if channels == 3:
        strengths |= {"saturation": 1.0, "hue": 180.0}
    color = jax.jit(
        jax.vmap(functools.partial(change_colors, strengths=strengths), in_axes=(0, None))
    )
    keys = jax.random.split(jax.random.key(0), 50)
    images = np.asarray(color(keys, jnp.asarray(gray)))
    assert images.shape == (50, H, W, channels)
    assert images.min() >= 0 and images.max() <= 255 and np.ptp(images) > 200
    np.testing.assert_allclose(images, images[..., :1].repeat(channels, -1), atol=1e-2)


def test_gray_levels_that_no_sensor_limits_are_not_clipped():
    """Only gamma, which has no meaning for negative values, takes them as 0."""
    image = jnp.array([[[-300.0], [-20.0], [100.0], [700.0]]])
    strengths = {"brightness": 0.3, "contrast": 0.3, "offset": 10.0}
    key = jax.random.key(0)
    found = np.asarray(jax.jit(lambda x: change_colors(key, x, strengths, clip=False))(image))
    differences = np.diff(found[0, :, 0]) / np.diff(image[0, :, 0])
    np.testing.assert_allclose(differences, differences[0], rtol=1e-4)  # a linear map
    assert found.min() < -100 and found.max() > 400
    found = np.asarray(jax.jit(lambda x: change_colors(key, x, {"gamma": 1.0}, clip=False))(image))
    np.testing.assert_array_equal(found[0, :2, 0], 0)
    assert found[0, 3, 0] > 255


@pytest.mark.parametrize("name", ["saturation", "hue"])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_colors_of_what_has_none_are_an_error(name, channels):
    color = functools.partial(change_colors, strengths={name: 0.5})
    with pytest.raises(ValueError, match=f"augment.{name}=0.5 .* 3 channels, .* have {channels}"):
        jax.eval_shape(color, jax.random.key(0), jnp.zeros((4, 4, channels)))
