"""Ways to enlarge a feature map: the `model.upsampling` axis.

Every upsampler is a Module built with `features` and called `up(x, switches=None)`; x [b, h, w, c]
becomes [b, factor * h, factor * w, features]. `switches` are those of the max-pool that the
upsampling mirrors (see `layers.Pyramid`), or None where there was no such pool. A method that does
not mix channels has a 1x1 convolution in front of it, at the lower resolution, where c is not
`features`. To add a method, write its class here and give it a line in UPSAMPLERS: decoders,
configs and tests pick it up.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dense_jax.devices.cpu import Conv, convolution
from dense_jax.models.layers import Project, max_unpool, pixel_shuffle


def enlarge_nearest(x: Array, factor: int) -> Array:
    """Every pixel repeated over its cell."""
    return x.repeat(factor, axis=1).repeat(factor, axis=2)


def enlarge_bilinear(x: Array, factor: int, axis: int) -> Array:
    """Linear interpolation along one axis with half-pixel centers and clamped edges.

    The same as torch's `align_corners=False`. Each of the `factor` phases is a weighted sum of two
    shifted copies, which is cheaper than the dense matrices of `jax.image.resize`.
    """
    size = x.shape[axis]
    before = jnp.take(x, jnp.maximum(jnp.arange(size) - 1, 0), axis, mode="clip")
    after = jnp.take(x, jnp.minimum(jnp.arange(size) + 1, size - 1), axis, mode="clip")
    phases = []
    for phase in range(factor):
        shift = (phase + 0.5) / factor - 0.5  # of the output's center, in input pixels
        neighbor = before if shift < 0 else after
        phases.append((1 - abs(shift)) * x + abs(shift) * neighbor)
    shape = (*x.shape[:axis], factor * size, *x.shape[axis + 1 :])
    return jnp.stack(phases, axis + 1).reshape(shape)


def transposed_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c f"], factor: int
) -> Float[Array, "b H W f"]:
    """Every pixel of x adds its value times the kernel around its own factor x factor cell.

    With p = (k - factor + 1) // 2, pixel (i, j) reaches rows factor * i - p ... + k - 1: torch's
    conv_transpose2d(stride=factor, padding=p, output_padding=factor - k + 2p). Computed at the
    lower resolution, with a kernel per phase of the output, so that no product with a zero is.
    """
    k = kernel.shape[0]
    padding = (k - factor + 1) // 2
    # Output phase r of cell i gets input i + d through kernel row r + padding - factor * d.
    first, last = -((k - 1 - padding) // factor), (factor - 1 + padding) // factor
    taps = last - first + 1
    before = factor * last - padding
    fill = (before, factor * taps - k - before)
    phases = jnp.pad(kernel, (fill, fill, (0, 0), (0, 0)))
    phases = phases.reshape(taps, factor, taps, factor, *kernel.shape[2:])[::-1, :, ::-1]
    phases = phases.transpose(0, 2, 4, 1, 3, 5).reshape(taps, taps, kernel.shape[2], -1)
    y = convolution(x, phases, (1, 1), ((-first, last),) * 2)
    return pixel_shuffle(y, factor)


def bilinear_kernel(size: int, factor: int, channels: int) -> Float[np.ndarray, "k k c c"]:
    """FCN's initialization of a transposed convolution (its surgery.py): channel-wise bilinear.

    Scaled to unit gain where `size` is not the usual 2 * factor - factor % 2.
    """
    reach = (size + 1) // 2
    middle = reach - 1 if size % 2 else reach - 0.5
    weights = (1 - abs(np.arange(size) - middle) / reach) * factor / reach
    kernel = np.outer(weights, weights)[..., None, None] * np.eye(channels)
    return kernel.astype(np.float32)


class Nearest(nn.Module):
    """Every pixel repeated."""

    features: int
    factor: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        x = Project(self.features, self.dtype, name="project")(x)
        return enlarge_nearest(x, self.factor)


class Bilinear(nn.Module):
    """Bilinear interpolation (half-pixel centers).

    The weights of an interpolation sum to one, so the projection commutes with it: at the lower
    resolution it is the same function for 1/factor^2 of the work.
    """

    features: int
    factor: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        x = Project(self.features, self.dtype, name="project")(x)
        return enlarge_bilinear(enlarge_bilinear(x, self.factor, axis=1), self.factor, axis=2)


class BedOfNails(nn.Module):
    """Every value in the top left pixel of its cell, 0 elsewhere."""

    features: int
    factor: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        x = Project(self.features, self.dtype, name="project")(x)
        spread = (0, self.factor - 1, self.factor - 1)
        return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), spread, spread, (0, 0, 0)))


class MaxUnpool(nn.Module):
    """Every value where the encoder's maximum was, 0 elsewhere (SegNet, arXiv 1511.00561).

    x is projected to the channels of the switches, and the result, if need be, to `features`.
    Raises ValueError without switches, or for another factor than the 2 of their pool.
    """

    features: int
    factor: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        if switches is None or self.factor != 2:
            raise ValueError(
                "max_unpool needs the switches of a 2x2 max-pool, and there are none here: use "
                "bed_of_nails, or a unet over plain or vgg16"
            )
        x = Project(switches.shape[-1], self.dtype, name="project")(x)
        return Project(self.features, self.dtype, name="widen")(max_unpool(x, switches))


class TransposedConv(nn.Module):
    """Learned transposed convolution ("up-convolution" in U-Net, "deconvolution" in FCN).

    kernel_size: in output pixels; None is `factor`, where kernels do not overlap, or with
      `bilinear` FCN's 2 * factor - factor % 2. Sizes that are no multiple of the factor are
      allowed; they cover the output unevenly (checkerboard).
    bilinear: whether it starts as channel-wise interpolation, rather than random with unit gain.
    learn: False keeps that interpolation (FCN's fixed upsampling): then there are no parameters.
    """

    features: int
    factor: int = 2
    kernel_size: int | None = None
    bilinear: bool = False
    learn: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        f = self.factor
        if self.bilinear:
            size = self.kernel_size or 2 * f - f % 2
            x = Project(self.features, self.dtype, name="project")(x)
            interpolation = jnp.asarray(bilinear_kernel(size, f, self.features))
            if not self.learn:
                return transposed_conv(x, interpolation.astype(x.dtype), f)
            init = lambda key, shape: interpolation
        else:
            size = self.kernel_size or f
            # Unit gain: of size^2 weights, (size / factor)^2 reach any one output pixel.
            init = nn.initializers.variance_scaling(min(size, f) ** 2, "fan_in", "truncated_normal")
        kernel = self.param("kernel", init, (size, size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return transposed_conv(x, kernel, f) + bias[None, None, None]


class PixelShuffle(nn.Module):
    """3x3 convolution to factor^2 * features, spread over the cell (arXiv 1609.05158, section 2.2).

    icnr: whether all pixels of a cell start with the same kernel, so that there is no
      checkerboard at first (arXiv 1707.02937), rather than with random ones.
    """

    features: int
    factor: int = 2
    icnr: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        phases = self.factor**2

        def same_for_all(key, shape, dtype):
            kernel = nn.initializers.he_normal()(key, (*shape[:-1], self.features), dtype)
            return jnp.tile(kernel, phases)

        x = Conv(
            phases * self.features,
            (3, 3),
            kernel_init=same_for_all if self.icnr else nn.initializers.he_normal(),
            dtype=self.dtype,
            name="conv",
        )(x)
        return pixel_shuffle(x, self.factor)


class ResizeConv(nn.Module):
    """Every pixel repeated, then a 3x3 convolution (Odena et al. 2016, distill.pub)."""

    features: int
    factor: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        x = enlarge_nearest(x, self.factor)
        return Conv(
            self.features,
            (3, 3),
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            name="conv",
        )(x)


def make_transposed_conv(
    features: int,
    factor: int = 2,
    *,
    kernel_size: int | None = None,
    init: str | None = None,
    learn: bool = True,
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
) -> nn.Module:
    """TransposedConv; init: None (random) or "bilinear". (A Module has no room for an `init`.)"""
    if init not in (None, "bilinear"):
        raise ValueError(f"transposed_conv: init={init!r} must be 'bilinear' or unset")
    if not learn and init is None:
        raise ValueError("transposed_conv: learn=False keeps the kernel: it needs init='bilinear'")
    if kernel_size is not None and kernel_size < 1:
        raise ValueError(f"transposed_conv: kernel_size={kernel_size} must be at least 1")
    return TransposedConv(features, factor, kernel_size, bool(init), learn, dtype, name=name)


def make_pixel_shuffle(
    features: int,
    factor: int = 2,
    *,
    init: str | None = None,
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
) -> nn.Module:
    """PixelShuffle; init: None (random) or "icnr"."""
    if init not in (None, "icnr"):
        raise ValueError(f"pixel_shuffle: init={init!r} must be 'icnr' or unset")
    return PixelShuffle(features, factor, bool(init), dtype, name=name)


UPSAMPLERS: dict[str, Callable[..., nn.Module]] = {
    "nearest": Nearest,
    "bilinear": Bilinear,
    "bed_of_nails": BedOfNails,
    "max_unpool": MaxUnpool,
    "transposed_conv": make_transposed_conv,
    "pixel_shuffle": make_pixel_shuffle,
    "resize_conv": ResizeConv,
}
