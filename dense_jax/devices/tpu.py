"""A fast implementation of convolutions for TPUs. `cpu.py` registers it for its primitives.

A TPU multiplies matrices of 128 x 128 values. Convolutions with fewer channels leave a part of each
matrix empty. Several neighboring pixels therefore become the channels of one, which is only a
reshape of the image. The larger kernel has zeros where a pixel does not reach another. The products
with zeros cost less than the empty part. benchmarks/tpu.md has the cycles.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

Pads = tuple[tuple[int, int], tuple[int, int]]
NHWC = ("NHWC", "HWIO", "NHWC")


def group_size(x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], pads: Pads) -> int:
    """Returns how many neighboring pixels of a row to combine, a power of 2 up to 8.

    Two operands of about 128 channels fill the matrices. Only convolutions that keep the width
    combine pixels, and only as many as divide the width.
    """
    width, columns = x_shape[2], kernel_shape[1]
    if sum(pads[1]) != columns - 1:
        return 1
    wanted = round(math.log2(256 / sum(kernel_shape[2:])))
    return math.gcd(2 ** min(max(wanted, 0), 3), width)


def conv(x: Array, kernel: Array, *, pads: Pads) -> Array:
    """Convolves an image, float [b, h, w, c], with stride 1. `group_size` pixels become one."""
    n = group_size(x.shape, kernel.shape, pads)
    batch, height, width, channels = x.shape
    (left, _), columns = pads[1], kernel.shape[1]
    before, after = -(-left // n), (n + columns - 2 - left) // n  # in groups
    length = (before + 1 + after) * n
    starts = [before * n - left + i for i in range(n)]  # of the taps of each pixel of a group
    shifted = [
        jnp.pad(kernel, ((0, 0), (start, length - columns - start), (0, 0), (0, 0)))
        for start in starts
    ]
    grouped = jnp.stack(shifted, axis=3).reshape(len(kernel), length // n, n * channels, -1)
    y = jax.lax.conv_general_dilated(
        x.reshape(batch, height, width // n, n * channels),
        grouped,
        (1, 1),
        (pads[0], (before, after)) if n > 1 else pads,
        dimension_numbers=NHWC,
    )
    return y.reshape(*y.shape[:2], -1, kernel.shape[3])
