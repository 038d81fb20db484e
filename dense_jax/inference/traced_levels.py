"""Finds the levels of images (see `data.levels`) on the device, for exported programs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Num

from dense_jax.data import levels


def measure(images: Num[Array, "b h w c"], levels_of: levels.Rule) -> Float32[Array, "_ 2 c"]:
    """Returns the levels of each image, equal to those of `levels_of` but for float32's rounding.

    Images of `levels.MAX_SAMPLES` pixels and more are sampled on the same grid.
    """
    if levels_of.fixed is not None:
        return jnp.asarray(levels_of.fixed)[None]
    b, h, w, c = images.shape
    k = levels.stride(h, w)
    x = images[:, ::k, ::k].astype(jnp.float32)
    n = x.shape[1] * x.shape[2]
    low, high = x.min(axis=(1, 2)), x.max(axis=(1, 2))
    limits = levels_of.limits
    span = high - low if limits is None else jnp.full_like(low, limits[1] - limits[0])
    floor = jnp.maximum(span / 255, 1e-6 * jnp.maximum(jnp.abs(low), jnp.abs(high)))
    floor = jnp.where(floor > 1e-30, floor, 1.0)
    if levels_of.normalization == "image":
        # First over rows: shorter sums have smaller errors.
        mean = x.mean(axis=1, keepdims=True).mean(axis=2, keepdims=True)
        variance = jnp.square(x - mean).mean(axis=1).mean(axis=1)
        sd = jnp.maximum(jnp.sqrt(variance), floor)
        return jnp.stack([mean[:, 0, 0] - 2 * sd, mean[:, 0, 0] + 2 * sd], axis=1)
    pixels = x.reshape(b, n, c).transpose(0, 2, 1)
    low, high = -_percentile(-pixels), _percentile(pixels)
    missing = jnp.maximum(floor - (high - low), 0) / 2
    return jnp.stack([low - missing, high + missing], axis=1)


def _percentile(x: Float32[Array, "b c n"]) -> Float32[Array, "b c"]:
    """Returns the 99th percentile, interpolated linearly as in np.percentile."""
    place = (x.shape[-1] - 1) / 100  # from the largest, which is first
    before = int(place)
    largest, _ = jax.lax.top_k(x, min(before + 2, x.shape[-1]))
    return largest[..., before] + (place - before) * (largest[..., -1] - largest[..., before])
