"""Ways to enlarge a feature map: the `model.upsampling` axis.

Every upsampler is a Module built with `features` and called `up(x, switches=None)`; x [b, h, w, c]
becomes [b, factor * h, factor * w, features]. `switches` are those of the max-pool that the
upsampling mirrors (see `layers.Pyramid`), or None where there was no such pool. To add a method,
write its class here and give it a line in UPSAMPLERS: decoders, configs and tests pick it up.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def enlarge_bilinear(x: Array, factor: int, axis: int) -> Array:
    """Linear interpolation along one axis with half-pixel centres and clamped edges.

    The same as torch's `align_corners=False`. Each of the `factor` phases is a weighted sum of two
    shifted copies, which is cheaper than the dense matrices of `jax.image.resize`.
    """
    size = x.shape[axis]
    before = jnp.take(x, jnp.maximum(jnp.arange(size) - 1, 0), axis, mode="clip")
    after = jnp.take(x, jnp.minimum(jnp.arange(size) + 1, size - 1), axis, mode="clip")
    phases = []
    for phase in range(factor):
        shift = (phase + 0.5) / factor - 0.5  # of the output's centre, in input pixels
        neighbour = before if shift < 0 else after
        phases.append((1 - abs(shift)) * x + abs(shift) * neighbour)
    shape = (*x.shape[:axis], factor * size, *x.shape[axis + 1 :])
    return jnp.stack(phases, axis + 1).reshape(shape)


class Nearest(nn.Module):
    """1x1 convolution to `features`, then every pixel repeated."""

    features: int
    factor: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        x = nn.Conv(self.features, (1, 1), dtype=self.dtype)(x)
        return x.repeat(self.factor, axis=1).repeat(self.factor, axis=2)


class Bilinear(nn.Module):
    """1x1 convolution to `features`, then bilinear interpolation (half-pixel centres).

    The weights of an interpolation sum to one, so the projection commutes with it: at the lower
    resolution it is the same function for 1/factor^2 of the work.
    """

    features: int
    factor: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        x = nn.Conv(self.features, (1, 1), dtype=self.dtype)(x)
        x = enlarge_bilinear(x, self.factor, axis=1)
        return enlarge_bilinear(x, self.factor, axis=2)


class TransposedConv(nn.Module):
    """Learned transposed convolution ("up-convolution" in U-Net, "deconvolution" in FCN).

    kernel_size: in output pixels; None is `factor`, where kernels do not overlap. Sizes that are
      no multiple of the factor are allowed; they cover the output unevenly (checkerboard).
    """

    features: int
    factor: int = 2
    kernel_size: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        kernel = self.kernel_size or self.factor
        # The padding of torch.nn.ConvTranspose2d(kernel, stride, padding, output_padding) that
        # gives exactly factor * h rows.
        padding = (kernel - self.factor + 1) // 2
        output_padding = self.factor - kernel + 2 * padding
        edge = kernel - 1 - padding
        return nn.ConvTranspose(
            self.features,
            (kernel, kernel),
            strides=(self.factor, self.factor),
            padding=((edge, edge + output_padding),) * 2,
            # Unit gain: of kernel^2 weights, (kernel / factor)^2 reach any one output pixel.
            kernel_init=nn.initializers.variance_scaling(
                min(kernel, self.factor) ** 2, "fan_in", "truncated_normal"
            ),
            dtype=self.dtype,
        )(x)


UPSAMPLERS: dict[str, Callable[..., nn.Module]] = {
    "bilinear": Bilinear,
    "nearest": Nearest,
    "transposed_conv": TransposedConv,
}
