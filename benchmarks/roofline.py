"""Compares each layer of a network to the machine's roofline, for the report of benchmarks.speed.

A layer's minimum time is the longer of two times: the time for its FLOPs at the rate of a matrix
product, and the time for its memory traffic at the rate of a copy. Training needs three times the
FLOPs of the forward pass. Training moves the values and gradients of the input, output and
parameters, and reads the input and parameters again. The first layer's input needs no gradient.
"""

import collections
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from dense_jax.devices import cost, cpu, mesh
from dense_jax.models.upsampling.convolutions import TransposedConv

KINDS = (nn.Conv, nn.BatchNorm, TransposedConv)
COLUMNS = (
    *("layer", "in", "how often", "bound by"),
    *("forwards, ms", "of roofline", "training, ms", "of roofline"),
)


class Layer(NamedTuple):
    name: str
    module: nn.Module
    x: jax.ShapeDtypeStruct
    y: jax.ShapeDtypeStruct
    is_first: bool  # the input of the first layer needs no gradient


def layers_of(model: nn.Module, image: jax.ShapeDtypeStruct) -> list[tuple[Layer, int]]:
    """Returns pairs (layer, number of occurrences) for the distinct layers of a network."""
    found: dict[tuple, Layer] = {}
    count: dict[tuple, int] = collections.Counter()

    def note(call: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y, module = call(*args, **kwargs), context.module
        if isinstance(module, KINDS) and context.method_name == "__call__":
            kernel = getattr(module, "kernel_size", None)
            kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
            name = type(module).__name__ + (" {}x{}".format(*kernel) if kernel else "")
            name += f", {args[0].shape[-1]} to {y.shape[-1]}"
            x, y_shape = (jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (args[0], y))
            alone = module.clone(parent=None, name=None)
            key = name, x.shape, y.shape, not found
            found.setdefault(key, Layer(name, alone, x, y_shape, is_first=not found))
            count[key] += 1
        return y

    with nn.intercept_methods(note):
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=True), image)
    return [(layer, count[key]) for key, layer in found.items()]


def bytes_of(*trees: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


def calls(layer: Layer) -> tuple[dict[str, Callable[[], Any]], dict[str, tuple[int, int]]]:
    """Returns functions that run a layer forward and in training, and their (FLOPs, bytes)."""
    devices = mesh.make_mesh()
    split, whole = mesh.sharded(devices), mesh.replicated(devices)
    x, g = (
        jax.device_put(jax.random.normal(jax.random.key(i), each.shape, each.dtype), split)
        for i, each in enumerate((layer.x, layer.y))
    )
    variables = jax.device_put(jax.jit(layer.module.init)(jax.random.key(2), x), whole)
    others = {name: value for name, value in variables.items() if name != "params"}

    @cpu.fast
    def forward(params, x):
        return layer.module.apply({"params": params} | others, x, mutable=list(others))[0]

    def training(params, x, g):
        if layer.is_first:
            y, back = jax.vjp(lambda params: forward(params, x), params)
        else:
            y, back = jax.vjp(forward, params, x)
        return y, back(g)

    params = variables["params"]
    flops, once = cost.flops(forward, params, x) or 0, bytes_of(params, x, g)
    of_x = 0 if layer.is_first else bytes_of(x)
    needs = {
        "forward": (flops, once),
        "training": ((2 if layer.is_first else 3) * flops, 2 * once + bytes_of(params) + of_x),
    }
    jitted = jax.jit(forward), jax.jit(training)
    return {
        "forward": lambda: jax.block_until_ready(jitted[0](params, x)),
        "training": lambda: jax.block_until_ready(jitted[1](params, x, g)),
    }, needs


def rows(
    model: nn.Module,
    image: jax.ShapeDtypeStruct,
    seconds_of: Callable[[Mapping[str, Callable[[], Any]]], Mapping[str, float]],
    product_rate: float,
    copy_rate: float,
) -> list[list[str]]:
    """Returns table rows for COLUMNS, one for each layer and one for the sum of all layers.

    seconds_of: A timer that takes {name: function} and returns {name: seconds}.
    product_rate, copy_rate: The machine's rates, in FLOPs and bytes per second.
    """
    found, totals = [], dict.fromkeys(("forward", "training"), (0.0, 0.0))
    for layer, count in layers_of(model, image):
        functions, needs = calls(layer)
        seconds, cells, by_products = seconds_of(functions), [], False
        for each, (flops, moved) in needs.items():
            least = max(flops / product_rate, moved / copy_rate)
            by_products = flops / product_rate == least
            cells += [f"{1000 * seconds[each]:.2f}", f"{100 * least / seconds[each]:.0f} %"]
            so_far, least_so_far = totals[each]
            totals[each] = (so_far + count * seconds[each], least_so_far + count * least)
        shape = f"{layer.x.shape[0]} x {layer.x.shape[1]}²"
        found.append(
            [layer.name, shape, str(count), "products" if by_products else "memory", *cells]
        )
    sums = [
        cell
        for seconds, least in totals.values()
        for cell in (f"{1000 * seconds:.0f}", f"{100 * least / seconds:.0f} %")
    ]
    return [*found, ["all of them", "", "", "", *sums]]
