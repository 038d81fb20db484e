"""Random color augmentation on the device. It changes the image but not the label.

Each entry of COLORS is a function (key, strength, planes) that returns randomly changed planes. The
planes are the image's channels, float [c, h, w] in gray levels. These are 0 to 255 if they come from
the range of the sensor, and may lie outside if they come from the image's statistics.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

RGB_ONLY = ("saturation", "hue")
Planes = Float[Array, "c h w"]


def change_colors(
    key: Key[Array, ""],
    image: Float[Array, "h w c"],
    strengths: Mapping[str, float],
    clip: bool = True,
) -> Float[Array, "h w c"]:
    """Applies the entries of COLORS with nonzero strength.

    clip: Whether to clip to [0, 255] after each entry, because no sensor gives other gray levels.

    Raises ValueError if hue or saturation has a nonzero strength and the image is not RGB.
    """
    if not any(strengths.get(name) for name in COLORS):
        return image
    # Computing on [c, h, w] is faster than on [h, w, c]. The loop over the channels makes XLA:CPU
    # resample the image once. Otherwise, XLA:CPU would resample the image for each use of a value.
    planes = jax.lax.map(lambda c: image[..., c], jnp.arange(image.shape[-1]))
    for i, (name, change) in enumerate(COLORS.items()):
        if strength := strengths.get(name):
            if name in RGB_ONLY and len(planes) != 3:
                raise ValueError(
                    f"augment.{name}={strength} needs images of 3 channels, and these have "
                    f"{len(planes)}: set it to 0"
                )
            planes = change(jax.random.fold_in(key, i), strength, planes)
            planes = planes.clip(0, 255) if clip else planes
    return jnp.moveaxis(planes, 0, -1)


def brightness(key: Key[Array, ""], strength: float, planes: Planes) -> Planes:
    """Multiplies the image by a factor drawn uniformly from [1 - strength, 1 + strength]."""
    return _factor(key, strength) * planes


def contrast(key: Key[Array, ""], strength: float, planes: Planes) -> Planes:
    """Scales the difference between each value and the image's mean luma by a random factor.

    The factor is drawn uniformly from [1 - strength, 1 + strength].
    """
    return _blend(jnp.mean(_gray(planes)), planes, _factor(key, strength))


def saturation(key: Key[Array, ""], strength: float, planes: Planes) -> Planes:
    """Scales the difference between each value and the pixel's luma by a random factor.

    The factor is drawn uniformly from [1 - strength, 1 + strength].
    """
    return _blend(_gray(planes), planes, _factor(key, strength))


def hue(key: Key[Array, ""], strength: float, planes: Planes) -> Planes:
    """Rotates the HSV hue by an angle drawn uniformly from [-strength, strength] degrees."""
    red, green, blue = planes
    value = planes.max(axis=0)
    chroma = value - planes.min(axis=0)
    # The hue in sixths of a turn from red. Gray has no hue, so any number works.
    sixths = jnp.select(
        [value == red, value == green],
        [green - blue, 2 * chroma + blue - red],
        4 * chroma + red - green,
    ) / jnp.where(chroma == 0, 1, chroma)
    sixths += _uniform(key, -strength, strength) / 60

    from_peak = sixths[None] + jnp.array([5.0, 3.0, 1.0])[:, None, None]
    from_peak -= 6 * jnp.floor(from_peak / 6)  # far faster than % on a CPU
    return value[None] - chroma[None] * jnp.minimum(from_peak, 4 - from_peak).clip(0, 1)


def gamma(key: Key[Array, ""], strength: float, planes: Planes) -> Planes:
    """Maps each value v to 255 * (v / 255)^g. Values below 0 become 0.

    The exponent g is drawn log-uniformly from [1 / (1 + strength), 1 + strength].
    """
    limit = math.log1p(strength)
    exponent = jnp.exp(_uniform(key, -limit, limit))
    return 255 * jnp.exp(exponent * jnp.log(planes.clip(0) / 255))  # far faster than ** on a CPU


def blur(key: Key[Array, ""], strength: float, planes: Planes) -> Planes:
    """Blurs with a Gaussian whose sigma is drawn uniformly from [0, strength] pixels.

    The radius of the kernel is 3 * strength, rounded up. The image is mirrored at the border.
    """
    radius = math.ceil(3 * strength)
    sigma = _uniform(key, 1e-3, strength)  # a sigma this small changes nothing
    weights = jnp.exp(-0.5 * (jnp.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (1, 2):
        padding = [(0, 0)] * 3
        padding[axis] = (radius, radius)
        padded = jnp.pad(planes, padding, mode="reflect")
        # Shifted sums fuse into one loop. A convolution is slow if each example has a different
        # kernel.
        blurred = jnp.zeros_like(planes)
        for i, weight in enumerate(weights):
            blurred += weight * jax.lax.slice_in_dim(padded, i, i + planes.shape[axis], axis=axis)
        planes = blurred
    return planes


def noise(key: Key[Array, ""], strength: float, planes: Planes) -> Planes:
    """Adds Gaussian noise whose sigma is drawn uniformly from [0, strength] gray levels."""
    key_amount, key_noise = jax.random.split(key)
    return planes + _uniform(key_amount, 0.0, strength) * jax.random.normal(key_noise, planes.shape)


def offset(key: Key[Array, ""], strength: float, planes: Planes) -> Planes:
    """Adds a number drawn uniformly from [-strength, strength] gray levels to the image."""
    return planes + _uniform(key, -strength, strength)


def _uniform(key: Key[Array, ""], low: float, high: float) -> Float[Array, ""]:
    return jax.random.uniform(key, (), minval=low, maxval=high)


def _factor(key: Key[Array, ""], strength: float) -> Float[Array, ""]:
    return _uniform(key, 1 - strength, 1 + strength)


def _blend(gray: Float[Array, "..."], planes: Planes, factor: Float[Array, ""]) -> Planes:
    return gray + factor * (planes - gray)


def _gray(planes: Planes) -> Float[Array, "1 h w"]:
    """Returns the luma of an RGB image, or the channel mean of any other image."""
    if len(planes) != 3:
        return planes.mean(axis=0, keepdims=True)
    red, green, blue = planes
    return (0.299 * red + 0.587 * green + 0.114 * blue)[None]  # ITU-R BT.601


COLORS = {
    change.__name__: change
    for change in (brightness, contrast, saturation, hue, gamma, blur, noise, offset)
}
