"""The convolution of all layers: XLA's, written so that it is fast on a CPU too.

What XLA:CPU is slow at is written in another way, of the same value but for the order of sums; GPUs
and TPUs get XLA's own, chosen while lowering. benchmarks/speed.md has what that is worth.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

NHWC = ("NHWC", "HWIO", "NHWC")
# The options of jax.lax.conv_general_dilated that change nothing.
PLAIN = {
    "lhs_dilation": (1, 1),
    "rhs_dilation": (1, 1),
    "feature_group_count": 1,
    "batch_group_count": 1,
    "dimension_numbers": jax.lax.conv_dimension_numbers((1,) * 4, (1,) * 4, NHWC),
}
# XLA:CPU takes Eigen for convolutions from and to no more channels than this, YNNPACK for others.
FEW = 16
# YNNPACK of jaxlib 0.10 runs most convolutions on one thread.
IS_THREADED = jax.__version_info__ >= (0, 11)
# From this many weights of a tap for each pixel on, turning the kernel round takes longer than
# anything else.
MANY = 128

Pads = tuple[tuple[int, int], tuple[int, int]]


def convolution(
    x: Float[Array, "b *space c"],
    kernel: Float[Array, "*window d f"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "b *Space f"]:
    """jax.lax.conv_general_dilated, by default of [b, h, w, c] and [h, w, c, f].

    Only what has stride 1, less padding than the kernel's size and no options but `PLAIN` is written
    in another way. All else is left to it, whatever options it will have.
    """
    if tuple(strides) == (1, 1) and all(PLAIN.get(name) == options[name] for name in options):
        size = kernel.shape[:2]
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(x.shape[1:3], size, (1, 1), padding)
        rows, columns = map(tuple, padding)
        if all(0 <= n < s for s, ends in zip(size, (rows, columns), strict=True) for n in ends):
            return x @ kernel[0, 0] if size == (1, 1) else by_platform(x, kernel, (rows, columns))
    others: Any = {"dimension_numbers": NHWC} | options
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **others)


Conv = functools.partial(nn.Conv, conv_general_dilated=convolution)


def plain(x: Array, kernel: Array, pads: Pads) -> Array:
    """XLA's own, of stride 1."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=NHWC)


def _on_cpu(x: Array, kernel: Array, pads: Pads) -> Array:
    if max(kernel.shape[2:]) <= FEW:
        return _two_at_once(x, kernel, pads) if IS_THREADED else plain(x, kernel, pads)
    return plain(x, kernel, pads) if IS_THREADED else _by_eigen(x, kernel, pads)


def _by_eigen(x: Array, kernel: Array, pads: Pads) -> Array:
    """The same with a row more than x has, which YNNPACK does not take."""
    (top, bottom), columns = pads
    extra = max(0, len(kernel) - top - bottom)
    y = plain(x, kernel, ((top, bottom + extra), columns))
    return y[:, : y.shape[1] - extra]


def _two_at_once(x: Array, kernel: Array, pads: Pads) -> Array:
    """The same with two neighboring pixels as one of twice the channels, which YNNPACK takes.

    Its kernels are one column wider, with zeros: a third more products of 3x3.
    """
    _, columns, _, features = kernel.shape
    (left, right), width = pads[1], x.shape[2] + sum(pads[1]) - columns + 1
    shifted = [jnp.pad(kernel, ((0, 0), (i, 1 - i), (0, 0), (0, 0))) for i in (0, 1)]
    y = jax.lax.conv_general_dilated(
        x,
        jnp.concatenate(shifted, axis=-1),
        (1, 2),
        (pads[0], (left, right + 1)),  # of an odd width, the last pixel too has a neighbor
        dimension_numbers=NHWC,
    )
    return y.reshape(*y.shape[:2], 2 * y.shape[2], features)[:, :, :width]


def _forward(x: Array, kernel: Array, pads: Pads) -> Array:
    cpu, default = (functools.partial(each, pads=pads) for each in (_on_cpu, plain))
    return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _backward(pads: Pads, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    def by_xla(x, kernel, g):
        return jax.vjp(functools.partial(plain, pads=pads), x, kernel)[1](g)

    def on_cpu(x, kernel, g):
        if math.prod(kernel.shape[2:]) >= MANY * math.prod(x.shape[:3]):
            _, of_kernel = by_xla(x, kernel, g)  # what is not returned is not computed
            return _input_gradient(g, kernel, pads), of_kernel
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        of_x = _on_cpu(g, turned, _back(pads, kernel.shape))
        return of_x, _kernel_gradient(x, g, pads, kernel.shape)

    return jax.lax.platform_dependent(*residuals, g, cpu=on_cpu, default=by_xla)


by_platform = jax.custom_vjp(_forward, nondiff_argnums=(2,))
by_platform.defvjp(
    lambda x, kernel, pads: (_forward(x, kernel, pads), (x, kernel)),
    _backward,
)


def _back(pads: Pads, size: Sequence[int]) -> Pads:
    """The padding with which a kernel of this size leads from an output back to the input."""
    rows, columns = (
        (n - 1 - low, n - 1 - high) for n, (low, high) in zip(size, pads, strict=False)
    )
    return rows, columns


def _input_gradient(g: Array, kernel: Array, pads: Pads) -> Array:
    """A matrix product for each tap: its matrix is the other way round without being moved."""
    (top, bottom), (left, right) = _back(pads, kernel.shape)
    rows, columns = kernel.shape[:2]
    h, w = g.shape[1] + top + bottom - rows + 1, g.shape[2] + left + right - columns + 1
    g = jnp.pad(g, ((0, 0), (top, bottom), (left, right), (0, 0)))
    exact = jnp.promote_types(g.dtype, jnp.float32)
    total = jnp.zeros((len(g), h, w, kernel.shape[2]), exact)
    for i, j in np.ndindex(rows, columns):
        pixels, tap = g[:, i : i + h, j : j + w], kernel[rows - 1 - i, columns - 1 - j]
        total += jnp.einsum("bhwf,cf->bhwc", pixels, tap, preferred_element_type=exact)
    return total.astype(g.dtype)


def _kernel_gradient(x: Array, g: Array, pads: Pads, size: Sequence[int]) -> Array:
    """The sum over all pixels (b, y, x) of x[b, y + i, x + j, c] g[b, y, x, f], at [i, j, c, f].

    A convolution over rows, of g with as many taps as x has rows: the pixels (b, x) of a row are
    its channels, and all (j, c) what it puts out. XLA's own is one over rows and columns, with the b
    images as its few channels, which takes up to four times as long.
    """
    rows, columns, channels, features = size
    if channels > features:  # the other way round: what is put side by side below is smaller then
        size = rows, columns, features, channels
        return _kernel_gradient(g, x, _back(pads, size), size)[::-1, ::-1].swapaxes(2, 3)
    h, w = g.shape[1:3]
    x = jnp.pad(x, ((0, 0), (0, 0), pads[1], (0, 0))).transpose(1, 0, 2, 3)
    shifted = _side_by_side([x[:, :, j : j + w] for j in range(columns)])
    y = jax.lax.conv_general_dilated(
        g.transpose(3, 1, 0, 2).reshape(features, h, -1),
        shifted.reshape(len(x), -1, columns * channels),
        (1,),
        _back(pads, size)[:1],
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    # g goes over x, so the taps come in reverse.
    return y.reshape(features, rows, columns, channels)[:, ::-1].transpose(1, 2, 3, 0)


def _side_by_side(parts: Sequence[Array]) -> Array:
    """jnp.concatenate of channels, as a sum, which XLA:CPU makes one loop of."""
    before, after = 0, sum(part.shape[-1] for part in parts)
    padded = []
    for part in parts:
        after -= part.shape[-1]
        padded.append(jnp.pad(part, ((0, 0),) * (part.ndim - 1) + ((before, after),)))
        before += part.shape[-1]
    return functools.reduce(jnp.add, padded)
