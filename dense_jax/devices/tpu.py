"""A fast form of networks for XLA:TPU. Models do not depend on this module.

A TPU multiplies matrices of 128 x 128 numbers, and stores channels in groups of 128. Layers with at
most 64 channels waste at least half of both. `in_pairs` therefore joins two neighboring pixels of
such layers: a feature map [b, h, w, c] becomes Pairs, which hold an array [b, h, w / 2, 2 * c].
Convolutions, batch norm, ReLUs, pooling and concatenation pass Pairs on, so nothing is copied in
between. Kernels are enlarged by zeros. The results differ only by rounding errors.

`in_pairs` traces a function and evaluates its equations one by one. RULES has the primitives that
accept Pairs; all others get ordinary arrays. benchmarks/tpu.md has the gains.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import Jaxpr, Literal
from jaxtyping import Array, Float

from dense_jax.devices.cpu import CONV, NHWC, Pads

LANES = 128  # channels that a TPU stores together


class Pairs(NamedTuple):
    """A feature map [b, h, w, c] whose horizontally neighboring pixels are joined.

    parts: Arrays [b, h, w / 2, 2 * d]. Their channels d, concatenated, are c.
    """

    parts: tuple[Float[Array, "b h w/2 _"], ...]


class Windows(NamedTuple):
    """The 2x2 windows [b, h / 2, 2, w / 2, 2, c] of a feature map whose pixels are joined.

    array: [b, h / 2, 2, w / 2, 2 * c].
    """

    array: Float[Array, "b h/2 2 w/2 _"]


class InPairs(NamedTuple):
    """A model whose `apply` joins neighboring pixels in layers of few channels."""

    model: nn.Module

    def apply(self, variables: Any, image: Array, **options: Any) -> Any:
        return in_pairs(functools.partial(self.model.apply, **options))(variables, image)


def in_pairs(function: Callable) -> Callable:
    """Returns a version of `function` that joins neighboring pixels in layers of few channels."""

    @functools.wraps(function)
    def evaluated(*args):
        jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = _evaluate(jaxpr.jaxpr, jaxpr.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), map(_plain, outputs))

    return evaluated


def _evaluate(jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def value_of(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        with contextlib.ExitStack() as scopes:
            for name in filter(None, str(eqn.source_info.name_stack).split("/")):
                scopes.enter_context(jax.named_scope(name))
            outputs = _outputs(eqn, [*map(value_of, eqn.invars)])
        values |= zip(eqn.outvars, outputs, strict=True)
    return [*map(value_of, jaxpr.outvars)]


def _outputs(eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    """Returns the values of an equation's outputs."""
    name, params = eqn.primitive.name, eqn.params
    rule = LAYERS.get(params["name"]) if name == "jit" else RULES.get(name)
    result = None if rule is None else rule(eqn, *inputs)
    if result is not None:
        return [result]
    if name == "jit":
        return _evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, inputs)
    outputs = eqn.primitive.bind(*map(_plain, inputs), **eqn.primitive.get_bind_params(params))
    return outputs if eqn.primitive.multiple_results else [outputs]


def _paired(x: Array) -> Array:
    """Joins pairs of pixels."""
    return x.reshape(*x.shape[:2], x.shape[2] // 2, 2 * x.shape[3])


def _plain(value: Any) -> Any:
    """Returns a value as an ordinary array."""
    if isinstance(value, Windows):
        b, h, _, w, _ = value.array.shape
        return value.array.reshape(b, h, 2, w, 2, -1)
    if isinstance(value, Pairs):
        b, h, w, _ = value.parts[0].shape
        x = jnp.concatenate([part.reshape(b, h, 2 * w, -1) for part in value.parts], axis=-1)
        return jax.lax.optimization_barrier(x)  # else XLA joins the pixels of what follows
    return value


# Each rule returns the value of an equation's output, or None if the equation needs plain arrays.


def _elementwise(eqn: Any, *inputs: Any) -> Pairs | None:
    shape = eqn.outvars[0].aval.shape
    if not any(isinstance(x, Pairs) for x in inputs):
        return None
    joined = []
    for x, variable in zip(inputs, eqn.invars, strict=True):
        if variable.aval.shape == ():
            joined.append(x)
        elif variable.aval.shape == (1, 1, 1, shape[3]):
            joined.append(jnp.tile(_plain(x), 2))
        elif variable.aval.shape != shape or (isinstance(x, Pairs) and len(x.parts) > 1):
            return None
        else:
            joined.append(x.parts[0] if isinstance(x, Pairs) else _paired(x))
    return Pairs((eqn.primitive.bind(*joined, **eqn.params),))


def _convolution(eqn: Any, x: Any, kernel: Array) -> Pairs | None:
    shape, pads = eqn.outvars[0].aval.shape, eqn.params["pads"]
    (left, _), (rows, columns, _, features) = pads[1], kernel.shape
    if 2 * features > LANES or shape[2] % 2 or shape[2] != eqn.invars[0].aval.shape[2]:
        return None
    # The pixels of a pair read the pixels from -left to columns - left, relative to the first. The
    # new kernel covers the pairs of these pixels.
    before, after = -(-left // 2), (columns - left) // 2
    first, size = 2 * before - left, 2 * (before + 1 + after)

    def enlarge(kernel):
        starts = (first, first + 1)
        moved = [jnp.pad(kernel, ((0, 0), (n, size - columns - n), (0, 0), (0, 0))) for n in starts]
        return jnp.concatenate(moved, axis=-1).reshape(rows, size // 2, -1, 2 * features)

    return Pairs((CONV.bind(*_joined(x, kernel, enlarge), pads=(pads[0], (before, after))),))


def _product(eqn: Any, x: Any, kernel: Array) -> Pairs | None:
    """Multiplies the channels of pairs of pixels, as a convolution with a 1x1 kernel does."""
    is_usual = eqn.params["dimension_numbers"] == (((3,), (0,)), ((), ()))
    if not isinstance(x, Pairs) or not is_usual or 2 * kernel.shape[1] > LANES:
        return None
    joined = _joined(x, kernel, lambda kernel: jax.scipy.linalg.block_diag(kernel, kernel))
    return Pairs((eqn.primitive.bind(*joined, **eqn.params),))


def _joined(x: Any, kernel: Array, enlarge: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Returns joined pixels [b, h, w / 2, 2 * c] and the enlarged kernel [..., 2 * c, 2 * f]."""
    parts = x.parts if isinstance(x, Pairs) else (_paired(x),)
    ends = [*itertools.accumulate(part.shape[3] // 2 for part in parts)]
    kernels = [enlarge(part) for part in jnp.split(kernel, ends[:-1], axis=-2)]
    return jnp.concatenate(parts, axis=-1), jnp.concatenate(kernels, axis=-2)


def _concatenate(eqn: Any, *inputs: Any) -> Pairs | None:
    if eqn.params["dimension"] != 3 or not any(isinstance(x, Pairs) for x in inputs):
        return None
    parts = (x.parts if isinstance(x, Pairs) else (_paired(x),) for x in inputs)
    return Pairs(tuple(itertools.chain(*parts)))


def _sum(eqn: Any, x: Any) -> Array | None:
    if not isinstance(x, Pairs) or eqn.params["axes"] != (0, 1, 2) or len(x.parts) > 1:
        return None
    return eqn.primitive.bind(x.parts[0], **eqn.params).reshape(2, -1).sum(axis=0)


def _windows(eqn: Any, x: Any) -> Windows | None:
    """Splits a feature map into 2x2 windows."""
    b, h, w, c = eqn.invars[0].aval.shape if isinstance(x, Pairs) else (0, 0, 0, 0)
    if eqn.params["new_sizes"] != (b, h // 2, 2, w // 2, 2, c) or len(x.parts) > 1:
        return None
    return Windows(x.parts[0].reshape(b, h // 2, 2, w // 2, 2 * c))


def _slice(eqn: Any, x: Any) -> Any:
    if not isinstance(x, Pairs | Windows) or eqn.params["strides"]:
        return None
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    spans = [slice(*ends) for ends in zip(starts, limits, strict=True)]
    whole = [slice(0, n) for n in eqn.invars[0].aval.shape]
    if isinstance(x, Windows):  # one pixel of each
        if spans[:2] + spans[3:4] + spans[5:] != whole[:2] + whole[3:4] + whole[5:]:
            return None
        (row, column), c = (spans[2], spans[4]), whole[5].stop
        pixels = x.array[:, :, row, :, column.start * c : column.stop * c]
        return pixels.reshape(eqn.outvars[0].aval.shape)
    if spans[3] != whole[3]:
        return None
    b, h, w, _ = spans
    pairs = slice(w.start // 2, -(-w.stop // 2))
    part = Pairs(tuple(part[b, h, pairs] for part in x.parts))
    if w == whole[2]:
        return part
    return _plain(part)[:, :, w.start - 2 * pairs.start :][:, :, : w.stop - w.start]


def _relu(eqn: Any, x: Any, *_: Any) -> Pairs | None:
    names = [inner.params.get("name") for inner in eqn.params["call_jaxpr"].eqns]
    if names != ["relu"] or not isinstance(x, Pairs) or len(x.parts) > 1:
        return None
    return Pairs((jax.nn.relu(x.parts[0]),))


def _transposed_convolution(eqn: Any, x: Any, kernel: Array) -> Any:
    x, (rows, _, channels, features) = _plain(x), kernel.shape
    factor = eqn.outvars[0].aval.shape[1] // x.shape[1]
    if factor > 2:
        return None  # XLA would multiply by the zeros between the pixels
    low = (rows - factor + 1) // 2
    pads, strides = ((low, rows - factor - low),) * 2, (factor, factor)
    kernel = kernel.swapaxes(2, 3)
    if rows == factor == 2 and 2 * features <= LANES:  # a pixel becomes two pairs, in two rows
        kernel = kernel.reshape(rows, 1, 2 * features, channels)
        return Pairs((_transposed(x, kernel, (factor, 1), pads),))
    return _transposed(x, kernel, strides, pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _transposed(x: Array, kernel: Array, strides: tuple[int, int], pads: Pads) -> Array:
    """Computes the transpose of a convolution [b, H, W, f] -> [b, h, w, c] with strides.

    XLA would compute the gradient of the kernel from reversed feature maps.
    """
    b, h, w, _ = x.shape
    shape = (b, h * strides[0], w * strides[1], kernel.shape[2])
    convolve = functools.partial(_strided, kernel=kernel, strides=strides, pads=pads)
    return jax.linear_transpose(convolve, jax.ShapeDtypeStruct(shape, x.dtype))(x)[0]


def _strided(y: Array, kernel: Array, strides: tuple[int, int], pads: Pads) -> Array:
    return jax.lax.conv_general_dilated(y, kernel, strides, pads, dimension_numbers=NHWC)


def _transposed_gradients(
    strides: tuple[int, int], pads: Pads, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    y, back = jax.vjp(lambda kernel: _strided(g, kernel, strides, pads), kernel)
    return y, back(x)[0]


_transposed.defvjp(
    lambda x, kernel, *options: (_transposed(x, kernel, *options), (x, kernel)),
    _transposed_gradients,
)

ELEMENTWISE = (
    *("add", "sub", "mul", "div", "max", "min", "gt", "lt", "integer_pow", "select_n"),
    *("convert_element_type", "stop_gradient"),
)
RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "conv": _convolution,
    "dot_general": _product,
    "concatenate": _concatenate,
    "reduce_sum": _sum,
    "reshape": _windows,
    "slice": _slice,
    "custom_jvp_call": _relu,
}
LAYERS = {"transposed_conv": _transposed_convolution}  # of jitted functions, by name
