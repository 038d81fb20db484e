"""Fixed (non-learned) upsampling methods."""

import functools
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.layers import Project, max_unpool
from dense_jax.models.segmenter import Upsampler


def repeat(x: Array, factor: int) -> Array:
    """Repeats each pixel factor x factor times (nearest neighbor)."""
    return x.repeat(factor, axis=1).repeat(factor, axis=2)


def bed_of_nails(x: Array, factor: int) -> Array:
    """Moves each value to the top-left pixel of its cell. All other pixels are 0."""
    spread = (0, factor - 1, factor - 1)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), spread, spread, (0, 0, 0)))


def bilinear(x: Array, factor: int) -> Array:
    """Interpolates bilinearly, with half-pixel centers and clamped edges.

    Equivalent to PyTorch's `interpolate` with mode="bilinear" and align_corners=False.
    """
    return interpolate(interpolate(x, factor, 1, linear_weight), factor, 2, linear_weight)


def bicubic(x: Array, factor: int) -> Array:
    """Interpolates bicubically, with half-pixel centers and clamped edges.

    Equivalent to PyTorch's `interpolate` with mode="bicubic" and align_corners=False.
    """
    return interpolate(interpolate(x, factor, 1, cubic_weight), factor, 2, cubic_weight)


def linear_weight(distance: float) -> float:
    """Returns the weight, in linear interpolation, of a pixel at a distance in input pixels."""
    return max(0.0, 1 - distance)


def cubic_weight(distance: float) -> float:
    """Returns the weight of a pixel in cubic convolution (Keys 1981) with a = -0.75, as in PyTorch.

    distance: The distance to the pixel in input pixels.
    """
    a, t = -0.75, distance
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def interpolate(x: Array, factor: int, axis: int, weight: Callable[[float], float]) -> Array:
    """Interpolates along one axis, with half-pixel centers and clamped edges.

    weight: The weight of an input pixel as a function of its distance to the output pixel, in input
      pixels. Weights at distances from 2 on must be 0.
    """
    # At each offset within a cell, the output is a weighted sum of shifted copies of x. This sum is
    # cheaper than the dense matrices of `jax.image.resize`.
    size = x.shape[axis]

    @functools.cache
    def shifted(offset: int) -> Array:
        positions = jnp.minimum(jnp.maximum(jnp.arange(size) + offset, 0), size - 1)
        return jnp.take(x, positions, axis, mode="clip") if offset else x

    phases: list[Any] = []
    for phase in range(factor):
        shift = (phase + 0.5) / factor - 0.5  # from input to output center, in input pixels
        weights = {offset: weight(abs(offset - shift)) for offset in (-2, -1, 0, 1, 2)}
        terms = (w * shifted(offset) for offset, w in weights.items() if w)
        phases.append(functools.reduce(operator.add, terms))
    shape = (*x.shape[:axis], factor * size, *x.shape[axis + 1 :])
    return jnp.stack(phases, axis + 1).reshape(shape)


class Fixed(Upsampler, kw_only=True):
    """Projects x to `features` channels, then upsamples with a fixed (non-learned) method.

    Projecting after upsampling would take factor^2 times as many operations. For interpolation, the
    result would be the same, because the interpolation weights sum to one.

    enlarge: The fixed method, a function of a feature map and the factor.
    """

    enlarge: Callable[[Array, int], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        return self.enlarge(Project(self.features, self.dtype, name="project")(x), self.factor)


class MaxUnpool(Upsampler):
    """Moves each value to the pixel where the encoder's max-pool found its maximum (the switch).

    All other pixels are 0, as in SegNet (arXiv 1511.00561). x is projected to the encoder's number
    of channels, unpooled, and projected to `features` channels. Raises ValueError if there are no
    switches or the factor is not 2.
    """

    needs_switches: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        if switches is None or self.factor != 2:
            raise ValueError(
                "max_unpool needs the switches of a 2x2 max-pool, and there are none here: use "
                "bed_of_nails or transposed_conv"
            )
        x = Project(switches.shape[-1], self.dtype, name="project")(x)
        return Project(self.features, self.dtype, name="widen")(max_unpool(x, switches))
