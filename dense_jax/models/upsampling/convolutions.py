"""Upsampling methods with a learned convolution."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.layers import Project, pixel_shuffle
from dense_jax.models.segmenter import Upsampler
from dense_jax.models.upsampling.fixed import repeat


@functools.partial(jax.jit, static_argnames=("factor", "convolve"))  # devices.tpu knows the name
def transposed_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c f"],
    factor: int,
    convolve: Callable[..., Array] = jax.lax.conv_general_dilated,
) -> Float[Array, "b H W f"]:
    """Computes a transposed convolution with a stride of `factor`.

    Input row i contributes to the k output rows that start at (factor * i - p), with
    p = (k - factor + 1) // 2. Equivalent to PyTorch's conv_transpose2d with stride=factor,
    padding=p and output_padding=(factor - k + 2 * p).
    """
    # A separate kernel for each offset within a cell keeps the computation at the lower resolution
    # and avoids products with inserted zeros.
    k = kernel.shape[0]
    padding = (k - factor + 1) // 2
    # Row r of cell i receives input i + d through kernel row r + padding - factor * d.
    first, last = -((k - 1 - padding) // factor), (factor - 1 + padding) // factor
    taps = last - first + 1
    before = factor * last - padding
    fill = (before, factor * taps - k - before)
    phases = jnp.pad(kernel, (fill, fill, (0, 0), (0, 0)))
    phases = phases.reshape(taps, factor, taps, factor, *kernel.shape[2:])[::-1, :, ::-1]
    phases = phases.transpose(0, 2, 4, 1, 3, 5).reshape(taps, taps, kernel.shape[2], -1)
    layout = jax.lax.conv_dimension_numbers(x.shape, phases.shape, ("NHWC", "HWIO", "NHWC"))
    y = convolve(x, phases, (1, 1), ((-first, last),) * 2, dimension_numbers=layout)
    return pixel_shuffle(y, factor)


def bilinear_kernel(size: int, factor: int, channels: int) -> Float[np.ndarray, "k k c c"]:
    """Returns a transposed convolution kernel that interpolates each channel bilinearly.

    For size = 2 * factor - factor % 2, the kernel is FCN's (surgery.py). Kernels of other sizes are
    scaled to unit gain.
    """
    reach = (size + 1) // 2
    middle = reach - 1 if size % 2 else reach - 0.5
    weights = (1 - abs(np.arange(size) - middle) / reach) * factor / reach
    kernel = np.outer(weights, weights)[..., None, None] * np.eye(channels)
    return kernel.astype(np.float32)


class TransposedConv(Upsampler):
    """A learned transposed convolution ("up-convolution" in U-Net, "deconvolution" in FCN).

    kernel_size: The size of the kernel in output pixels. If None, a bilinear kernel has the size
      2 * factor - factor % 2, as in FCN, and a random kernel has the size `factor`. A size that is
      not a multiple of `factor` causes a checkerboard pattern.
    bilinear: Whether the kernel starts as channel-wise bilinear interpolation. If False, the kernel
      is initialized randomly with unit gain.
    learn: Whether the kernel is learned. If False, the bilinear kernel is fixed, without a bias.
    conv_general_dilated: A replacement for jax.lax.conv_general_dilated, or None.
    """

    kernel_size: int | None = None
    bilinear: bool = False
    learn: bool = True
    conv_general_dilated: Callable[..., Array] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        f = self.factor
        convolve = self.conv_general_dilated or jax.lax.conv_general_dilated
        if self.bilinear:
            size = self.kernel_size or 2 * f - f % 2
            x = Project(self.features, self.dtype, name="project")(x)
            interpolation = jnp.asarray(bilinear_kernel(size, f, self.features))
            if not self.learn:
                return transposed_conv(x, interpolation.astype(x.dtype), f, convolve)
            init = lambda key, shape: interpolation
        else:
            size = self.kernel_size or f
            # Gives unit gain, because (size / factor)^2 of the size^2 weights reach each pixel.
            init = nn.initializers.variance_scaling(min(size, f) ** 2, "fan_in", "truncated_normal")
        kernel = self.param("kernel", init, (size, size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return transposed_conv(x, kernel, f, convolve) + bias[None, None, None]


class PixelShuffle(Upsampler):
    """A 3x3 convolution followed by a pixel shuffle (arXiv 1609.05158, section 2.2).

    icnr: Whether the random kernels for the pixels of a cell start out equal, which avoids an
      initial checkerboard (arXiv 1707.02937).
    """

    icnr: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        phases = self.factor**2

        def same_for_all(key, shape, dtype):
            kernel = nn.initializers.he_normal()(key, (*shape[:-1], self.features), dtype)
            return jnp.tile(kernel, phases)

        x = nn.Conv(
            phases * self.features,
            (3, 3),
            kernel_init=same_for_all if self.icnr else nn.initializers.he_normal(),
            dtype=self.dtype,
            name="conv",
        )(x)
        return pixel_shuffle(x, self.factor)


class ResizeConv(Upsampler):
    """Repeats every pixel, then applies a 3x3 convolution (Odena et al. 2016, distill.pub)."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        x = repeat(x, self.factor)
        return nn.Conv(
            self.features,
            (3, 3),
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            name="conv",
        )(x)


def make_transposed_conv(
    features: int,
    *,
    init: str | None = None,
    kernel_size: int | None = None,
    learn: bool = True,
    **fields: Any,
) -> TransposedConv:
    """Makes a TransposedConv. `init` is None (random) or "bilinear".

    The function exists because a Flax Module cannot have a field called `init`.
    """
    if init not in (None, "bilinear"):
        raise ValueError(f"transposed_conv: init={init!r} must be 'bilinear' or unset")
    if not learn and init is None:
        raise ValueError("transposed_conv: learn=False keeps the kernel: it needs init='bilinear'")
    if kernel_size is not None and kernel_size < 1:
        raise ValueError(f"transposed_conv: kernel_size={kernel_size} must be at least 1")
    return TransposedConv(
        features, kernel_size=kernel_size, bilinear=bool(init), learn=learn, **fields
    )


def make_pixel_shuffle(features: int, *, init: str | None = None, **fields: Any) -> PixelShuffle:
    """Makes a PixelShuffle. `init` is None (random) or "icnr"."""
    if init not in (None, "icnr"):
        raise ValueError(f"pixel_shuffle: init={init!r} must be 'icnr' or unset")
    return PixelShuffle(features, icnr=bool(init), **fields)
