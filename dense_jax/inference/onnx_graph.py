"""Converts a JAX function of images to an ONNX model, for images of one size in any number.

`convert` traces the function and translates the primitives of its jaxpr one by one: ELEMENTWISE has
those that ONNX has too, and RULES the others. Whatever does not depend on the images, such as the
weights of an interpolation, is computed here and stored. The rules are those that our networks
need; see https://onnx.ai/onnx/operators for the operators.

A value is the name of an ONNX tensor, or a NumPy array if it is known here.
"""

import hashlib
import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

try:
    import onnx
    from onnx import helper, numpy_helper
except ImportError as error:
    raise ValueError("ONNX files need a package: pip install 'onnx>=1.23'") from error

OPSET, IR_VERSION = 18, 9  # of 2023, so that most runtimes read the file
BATCH = "batch"
REFUSED = "the network cannot be written as ONNX: no rule for"
# Primitives whose operator has the same name, but for case, and the other elementwise ones.
SAME = (
    "Abs",
    "Add",
    "And",
    "Ceil",
    "Div",
    "Erf",
    "Exp",
    "Floor",
    "Log",
    "Max",
    "Min",
    "Mul",
    "Neg",
)
SAME += ("Not", "Or", "Pow", "Sign", "Sqrt", "Sub", "Tanh")
ELEMENTWISE = {operator.lower(): operator for operator in SAME} | {
    "copy": "Identity",
    "eq": "Equal",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "logistic": "Sigmoid",
    "lt": "Less",
    "stop_gradient": "Identity",
}
REDUCTIONS = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_sum": "ReduceSum"}
NHWC_TO_NCHW, NCHW_TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)

Value = str | np.ndarray


def convert(
    function: Callable[[jax.Array], jax.Array],
    images: jax.ShapeDtypeStruct,
    output: str,
    metadata: Mapping[str, str],
) -> bytes:
    """Returns the serialized ONNX model of function(images) -> an array [b, ...].

    images: The shape [h, w, c] and the type of one image. The model's input, "images", is
      [b, h, w, c] for any b >= 1.
    output: The name of the model's output.

    Raises ValueError, which names the primitive, if the function has a part without a rule.
    """
    (b,) = jax.export.symbolic_shape(BATCH)
    batch = jax.ShapeDtypeStruct((b, *images.shape), images.dtype)
    closed, result = jax.make_jaxpr(function, return_shape=True)(batch)
    graph = _Graph()
    (value,) = _translate(graph, closed.jaxpr, closed.consts, ["images"])
    graph.nodes.append(helper.make_node("Identity", [graph.named(value)], [output]))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "dense_jax",
            [_declared("images", batch)],
            [_declared(output, result)],
            graph.initializers,
        ),
        producer_name="dense_jax",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _declared(name: str, array: jax.ShapeDtypeStruct) -> Any:
    dims = [n if isinstance(n, int) else BATCH for n in array.shape]
    return helper.make_tensor_value_info(name, _type(array.dtype), dims)


def _type(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


class _Graph:
    """The nodes and the stored arrays of an ONNX graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._names = (f"x{i}" for i in itertools.count())
        self._stored: dict[Any, str] = {}

    def add(self, op: str, *inputs: Value, num_outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node. Returns the name of its output, or a list of names if there are several."""
        outputs = [next(self._names) for _ in range(num_outputs)]
        names = [self.named(value) for value in inputs]
        self.nodes.append(helper.make_node(op, names, outputs, **attributes))
        return outputs[0] if num_outputs == 1 else outputs

    def named(self, value: Value) -> str:
        """Returns the name of a value. Stores it first if it is an array."""
        if isinstance(value, str):
            return value
        key = value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).digest()
        if key not in self._stored:
            self._stored[key] = next(self._names)
            array = np.asarray(value, order="C")
            self.initializers.append(numpy_helper.from_array(array, self._stored[key]))
        return self._stored[key]

    def transpose(self, x: Value, permutation: Sequence[int]) -> Value:
        if isinstance(x, np.ndarray):
            return x.transpose(permutation)
        return self.add("Transpose", x, perm=permutation)

    def reshape(self, x: Value, shape: Sequence[Any]) -> Value:
        """Reshapes x. One of the lengths may depend on the number of images."""
        if isinstance(x, np.ndarray):
            return x.reshape(shape)
        return self.add("Reshape", x, _integers([n if isinstance(n, int) else -1 for n in shape]))

    def expand(self, x: Value, old: Sequence[Any], new: Sequence[Any]) -> Value:
        """Broadcasts x, whose shape is `old`, to the shape `new` with as many axes."""
        if tuple(old) == tuple(new):
            return x
        sizes: list[Value] = []
        for n, m in zip(old, new, strict=True):
            if n == m or isinstance(m, int):
                sizes.append(_integers([1 if n == m else m]))  # 1 leaves the length as it is
            elif str(m) == BATCH:
                sizes.append(self.add("Shape", "images", start=0, end=1))
            else:
                raise ValueError(f"{REFUSED} a length of {m}")
        return self.add("Expand", x, self.add("Concat", *sizes, axis=0))

    def slice(self, x: Value, axis: int, start: int, end: int, step: int = 1) -> Value:
        return self.add("Slice", x, *(_integers([n]) for n in (start, end, axis, step)))


def _integers(values: Any) -> np.ndarray:
    return np.array(values, np.int64)


def _translate(
    graph: _Graph, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]
) -> list[Any]:
    """Adds the nodes of a jaxpr to the graph. Returns the values of its results."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, map(np.asarray, constants), strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def value_of(atom: Any) -> Any:
        if isinstance(atom, Literal):
            aval: Any = atom.aval
            return np.asarray(atom.val, aval.dtype)  # it may be a Python number
        return values.get(atom)

    # Equations that only make arrays without elements, as for padding by 0, are left out.
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if any(var in needed and 0 not in var.aval.shape for var in eqn.outvars):
            needed |= {atom for atom in eqn.invars if not isinstance(atom, Literal)}
            kept.append(eqn)
    for eqn in reversed(kept):
        values |= zip(eqn.outvars, _outputs(graph, eqn, [*map(value_of, eqn.invars)]), strict=True)
    return [value_of(atom) for atom in jaxpr.outvars]


def _outputs(graph: _Graph, eqn: Any, inputs: list[Any]) -> list[Any]:
    """Returns the values of an equation's outputs. Inputs without elements are None."""
    name, shapes = eqn.primitive.name, [var.aval.shape for var in eqn.outvars]
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))  # of jit, remat and custom_jvp
    if inner is not None:
        consts = getattr(inner, "consts", [])
        return _translate(graph, getattr(inner, "jaxpr", inner), consts, inputs)
    if all(isinstance(n, int) for shape in shapes for n in shape) and not any(
        isinstance(value, str) for value in inputs
    ):
        known = eqn.primitive.bind(*inputs, **eqn.params)
        return [*map(np.asarray, known if eqn.primitive.multiple_results else [known])]
    if name in ELEMENTWISE:
        return [graph.add(ELEMENTWISE[name], *inputs)]
    if name in REDUCTIONS:
        axes = _integers(eqn.params["axes"])
        return [graph.add(REDUCTIONS[name], inputs[0], axes, keepdims=0)]
    if name not in RULES:
        raise ValueError(f"{REFUSED} {name!r}")
    result = RULES[name](graph, eqn, *inputs)
    return result if isinstance(result, list) else [result]


def _argmax(graph: _Graph, eqn: Any, x: Value) -> Value:
    (axis,) = eqn.params["axes"]
    index = graph.add("ArgMax", x, axis=axis, keepdims=0)
    return graph.add("Cast", index, to=_type(eqn.params["index_dtype"]))


def _broadcast(graph: _Graph, eqn: Any, x: Value) -> Value:
    old, new = eqn.invars[0].aval.shape, eqn.params["shape"]
    middle: list[Any] = [1] * len(new)
    for axis, n in zip(eqn.params["broadcast_dimensions"], old, strict=True):
        middle[axis] = n
    x = x if len(old) == len(new) else graph.reshape(x, middle)
    return graph.expand(x, middle, new)


def _cast(graph: _Graph, eqn: Any, x: Value) -> Value:
    if eqn.invars[0].aval.dtype == eqn.params["new_dtype"]:
        return x
    return graph.add("Cast", x, to=_type(eqn.params["new_dtype"]))


def _concatenate(graph: _Graph, eqn: Any, *parts: Value | None) -> Value:
    present = [part for part in parts if part is not None]
    return graph.add("Concat", *present, axis=eqn.params["dimension"])


def _convolution(graph: _Graph, eqn: Any, x: Value, kernel: Value) -> Value:
    p = eqn.params
    layout, pads = p["dimension_numbers"], np.array(p["padding"])
    if set(p["lhs_dilation"]) != {1} or p["batch_group_count"] != 1 or (pads < 0).any():
        raise ValueError(f"{REFUSED} a convolution with negative padding or a dilated input")
    y = graph.add(
        "Conv",
        graph.transpose(x, layout.lhs_spec),
        graph.transpose(kernel, layout.rhs_spec),
        strides=p["window_strides"],
        pads=pads.T.ravel().tolist(),
        dilations=p["rhs_dilation"],
        group=p["feature_group_count"],
    )
    return graph.transpose(y, np.argsort(layout.out_spec).tolist())


def _dot(graph: _Graph, eqn: Any, x: Value, y: Value) -> Value:
    (contracted, batch), ranks = (
        eqn.params["dimension_numbers"],
        [var.aval.ndim for var in eqn.invars],
    )
    if not batch[0] and contracted == ((ranks[0] - 1,), (0,)) and ranks[1] == 2:
        return graph.add("MatMul", x, y)
    letters = iter(string.ascii_lowercase)
    axes = [[next(letters) for _ in range(rank)] for rank in ranks]
    for pairs in (batch, contracted):
        for i, k in zip(*pairs, strict=True):
            axes[1][k] = axes[0][i]
    out = [axes[0][i] for i in batch[0]]
    for side in (0, 1):
        used = {*contracted[side], *batch[side]}
        out += [axis for i, axis in enumerate(axes[side]) if i not in used]
    equation = f"{''.join(axes[0])},{''.join(axes[1])}->{''.join(out)}"
    return graph.add("Einsum", x, y, equation=equation)


def _gather(graph: _Graph, eqn: Any, x: Value, indices: Value) -> Value:
    """Translates the gathers of constant indexing, jnp.take and jnp.take_along_axis."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, mapped = eqn.invars[0].aval.shape, numbers.start_index_map
    out = eqn.outvars[0].aval.shape
    if isinstance(indices, np.ndarray):
        most = [shape[axis] - sizes[axis] for axis in mapped]
        if (
            eqn.params["mode"] != jax.lax.GatherScatterMode.CLIP
            and ((indices < 0) | (indices > most)).any()
        ):
            raise ValueError(f"{REFUSED} indices outside of an array")
        indices = np.clip(indices, 0, most)
        if indices.ndim == 1:  # a single slice
            for axis, start in zip(mapped, indices.tolist(), strict=True):
                x = graph.slice(x, axis, start, start + sizes[axis])
            return graph.reshape(x, out)
        kept = tuple(axis for axis in range(len(out)) if axis not in mapped)
        if indices.ndim == 2 and len(mapped) == 1 and numbers.offset_dims == kept:
            return graph.add("Gather", x, indices[:, 0], axis=mapped[0])
    elif numbers.operand_batching_dims == numbers.start_indices_batching_dims:
        length = (
            eqn.invars[1].aval.ndim - 1
        )  # the last axis holds the coordinates, here a single one
        before = range(length)
        if {*numbers.operand_batching_dims, *mapped} == {*before} and len(mapped) == 1:
            old = [eqn.invars[1].aval.shape[i] if i in before else 1 for i in range(len(shape))]
            new = [old[i] if i in before else n for i, n in enumerate(shape)]
            limits = [np.array(n, np.int32) for n in (0, shape[mapped[0]] - 1)]
            index = graph.add("Max", graph.reshape(indices, old), limits[0])
            index = graph.expand(graph.add("Min", index, limits[1]), old, new)
            return graph.add("GatherElements", x, index, axis=mapped[0])
    raise ValueError(f"{REFUSED} {numbers}")


def _pad(graph: _Graph, eqn: Any, x: Value, fill: Value) -> Value:
    shape = list(eqn.invars[0].aval.shape)
    ends = []
    for axis, (low, high, interior) in enumerate(eqn.params["padding_config"]):
        if interior:  # also after the last element, which is cut off below
            cells = graph.reshape(x, [*shape[: axis + 1], 1, *shape[axis + 1 :]])
            ends_of_cells = _integers([0, interior])
            x = graph.add("Pad", cells, ends_of_cells, fill, _integers([axis + 1]))
            shape[axis] *= interior + 1
            x = graph.reshape(x, shape)
        ends.append((int(low), int(high) - int(interior)))
    for axis, (low, high) in enumerate(ends):
        if low < 0 or high < 0:
            x = graph.slice(x, axis, max(0, -low), shape[axis] + min(0, high))
    pads = np.maximum(ends, 0).T.ravel()
    return graph.add("Pad", x, _integers(pads), fill) if pads.any() else x


def _pool(graph: _Graph, eqn: Any, x: Value) -> Value:
    p = eqn.params
    window, strides, pads = (
        np.array(p[f"{name}"]) for name in ("window_dimensions", "window_strides", "padding")
    )
    if len(window) != 4 or {*window[[0, 3]], *strides[[0, 3]]} != {1} or pads[[0, 3]].any():
        raise ValueError(f"{REFUSED} a pool of channels")
    y = graph.add(
        "MaxPool",
        graph.transpose(x, NHWC_TO_NCHW),
        kernel_shape=window[1:3].tolist(),
        strides=strides[1:3].tolist(),
        pads=pads[1:3].T.ravel().tolist(),
        dilations=p["window_dilation"][1:3],
    )
    return graph.transpose(y, NCHW_TO_NHWC)


def _select(graph: _Graph, eqn: Any, which: Value, *cases: Value) -> Value:
    if eqn.invars[0].aval.dtype != bool:
        raise ValueError(f"{REFUSED} a choice by numbers")
    return graph.add("Where", which, cases[1], cases[0])


def _slice(graph: _Graph, eqn: Any, x: Value) -> Value:
    p, shape = eqn.params, eqn.invars[0].aval.shape
    steps = p["strides"] or (1,) * len(shape)
    for axis, (start, end, step) in enumerate(
        zip(p["start_indices"], p["limit_indices"], steps, strict=True)
    ):
        if (start, end, step) != (0, shape[axis], 1):
            x = graph.slice(x, axis, start, end, step)
    return x


def _stack(graph: _Graph, eqn: Any, *parts: Value) -> Value:
    axis = eqn.params["axis"]
    parts = tuple(graph.add("Unsqueeze", part, _integers([axis])) for part in parts)
    return graph.add("Concat", *parts, axis=axis)


def _top_k(graph: _Graph, eqn: Any, x: Value) -> list[Value]:
    k = _integers([eqn.params["k"]])
    values, indices = graph.add("TopK", x, k, axis=eqn.params["axis"], num_outputs=2)
    return [values, graph.add("Cast", indices, to=_type(np.int32))]


def _one(eqn: Any) -> np.ndarray:
    return np.ones((), eqn.outvars[0].aval.dtype)


RULES: dict[str, Callable[..., Any]] = {
    "argmax": _argmax,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "dot_general": _dot,
    "erfc": lambda graph, eqn, x: graph.add("Sub", _one(eqn), graph.add("Erf", x)),
    "gather": _gather,
    "integer_pow": lambda graph, eqn, x: graph.add("Pow", x, eqn.params["y"] * _one(eqn)),
    "ne": lambda graph, eqn, x, y: graph.add("Not", graph.add("Equal", x, y)),
    "pad": _pad,
    "reduce_window_max": _pool,
    "reshape": lambda graph, eqn, x: graph.reshape(x, eqn.params["new_sizes"]),
    "rsqrt": lambda graph, eqn, x: graph.add("Reciprocal", graph.add("Sqrt", x)),
    "select_n": _select,
    "slice": _slice,
    "square": lambda graph, eqn, x: graph.add("Mul", x, x),
    "squeeze": lambda graph, eqn, x: graph.reshape(x, eqn.outvars[0].aval.shape),
    "stack": _stack,
    "top_k": _top_k,
    "transpose": lambda graph, eqn, x: graph.transpose(x, eqn.params["permutation"]),
}
