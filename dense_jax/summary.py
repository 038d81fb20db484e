"""Measures of an architecture: size, cost, receptive field and evenness, before any training.

    python -m dense_jax.summary --config=experiments/unet_dice.py [--config.model.x=y]
    python -m dense_jax.summary --config=experiments/unet_dice.py --crossings

The first prints a table of the network's layers and the memory that a training step of the config
needs, as of `dense_jax.memory`; the second which encoders, decoders and upsampling methods can be
combined. Both are Markdown, and neither makes any parameter.
"""

import copy
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn

from dense_jax import command, memory, models
from dense_jax.devices import cost
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.upsampling import UPSAMPLERS


class Layer(NamedTuple):
    """What a module does and holds itself, without its submodules.

    path: names from the network down to the module.
    shape: of its output for one image.
    parameters: numbers, not counting batch norm's running statistics.
    flops: floating-point operations for one image; a multiply-add is two.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int
    flops: int


def layers(model: models.Segmenter, variables: Any, image: jax.ShapeDtypeStruct) -> list[Layer]:
    """The modules that hold parameters or enlarge their input, in order of execution.

    variables: the model's, or their shapes.
    image: [1, h, w, c].

    FLOPs are those of XLA's cost analysis before any optimization; it leaves out products with the
    zeros that pad a convolution, except for fc6, which is a matrix product.
    """
    calls = []

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            calls.append((context.module, args, output))
        return output

    with nn.intercept_methods(record):
        jax.eval_shape(functools.partial(model.apply, train=False), variables, image)
    parameters: Counter[tuple[str, ...]] = Counter()
    for path, x in jax.tree_util.tree_leaves_with_path(variables["params"]):
        parameters[tuple(key.key for key in path[:-1])] += x.size

    found: list[Layer] = []
    for module, args, output in calls:
        path = module.path
        is_map = isinstance(args[0], jax.Array) and isinstance(output, jax.Array)
        if path not in parameters and not (is_map and output.shape[1] > args[0].shape[1]):
            continue
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        own = {name: _inside(tree, path) for name, tree in variables.items()}
        flops = cost.flops(module.clone(parent=None).apply, own, *inputs) or 0
        flops -= sum(layer.flops for layer in found if layer.path[: len(path)] == path)
        found.append(Layer(path, output.shape, parameters[path], flops))
    return found


def table(model: models.Segmenter, size: tuple[int, int], channels: int = 3) -> str:
    """The layers and their total as a Markdown table, and the parameters of both halves.

    size: height and width of the image, pixels.

    The total's FLOPs are counted likewise, of the forward pass of one image, in evaluation. They are
    not quite the rows' sum: they also have ReLUs, pools and additive skips.
    """
    image = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    variables = _shapes(model, image)
    rows = layers(model, variables, image)
    forward = functools.partial(model.apply, train=False)
    flops = cost.flops(forward, variables, image) or 0
    logits: Any = jax.eval_shape(forward, variables, image)
    total = sum(x.size for x in jax.tree.leaves(variables["params"]))
    encoder = sum(row.parameters for row in rows if row.path[0] == "encoder")
    lines = [
        ("layer", "output", "parameters", "FLOPs"),
        *(_line("/".join(row.path), row.shape, row.parameters, row.flops) for row in rows),
        _line("total", logits.shape, total, flops),
    ]
    halves = f"Parameters: {encoder:,} in the encoder, {total - encoder:,} in the decoder."
    return f"{_markdown(lines, '<>>>')}\n\n{halves}"


def crossings(config: Any) -> str:
    """Which encoder, decoder and upsampling method `config.model` can have, as a Markdown table.

    A cell is "yes", or the number of the reason below the table.
    """
    reasons: list[str] = []

    def cell(**fields: str) -> str:
        crossed = copy.deepcopy(config)
        crossed.update(fields)
        try:
            models.build(crossed, num_classes=2)
        except ValueError as error:
            if str(error) not in reasons:
                reasons.append(str(error))
            return str(reasons.index(str(error)) + 1)
        return "yes"

    lines = [("encoder", "decoder", *UPSAMPLERS)]
    for encoder, name in itertools.product(ENCODERS, models.MODELS):
        cells = (cell(encoder=encoder, name=name, upsampling=method) for method in UPSAMPLERS)
        lines.append((encoder, name, *cells))
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([_markdown(lines, "<" * len(lines[0])), "", *notes])


def checkerboard_index(upsampler: nn.Module) -> float:
    """How unevenly the pixels of a cell are covered, by their phase (row and column mod factor).

    The standard deviation over the phases of their mean output, divided by the mean over all: of a
    constant map, with all kernels 1 and all biases 0, away from the border. 0 where all phases are
    covered alike, sqrt(factor^2 - 1) where a single one is. It is about the method, not about what
    random or learned kernels make of it. The switches of max_unpool point at every phase equally
    often, so that it has 0.
    """
    factor: int = upsampler.factor
    border = 2 + (getattr(upsampler, "kernel_size", None) or 0) // factor  # cells
    cells = 2 * border + 2  # even, as the switches have a period of 2 cells
    x = jnp.ones((1, cells, cells, upsampler.features))
    row, column = np.indices((cells, cells)) % 2
    switches = jnp.broadcast_to((2 * row + column)[None, :, :, None], x.shape)
    variables = _constant(
        jax.eval_shape(upsampler.init, jax.random.key(0), x, switches),
        lambda name, shape: name == "kernel",
    )
    y = np.asarray(jax.jit(upsampler.apply)(variables, x, switches), np.float64)
    y = y.reshape(cells, factor, cells, factor, -1)[border:-border, :, border:-border]
    phases = y.mean(axis=(0, 2, 4))
    return float(phases.std() / phases.mean())


def receptive_field(
    model: models.Segmenter, size: tuple[int, int], channels: int = 3
) -> tuple[slice, slice]:
    """The rows and columns of the image that the logits of its center pixel depend on, in pixels.

    The bounding box of that pixel's non-zero gradients, for pixel (height // 2, width // 2), in
    evaluation.

    size: height and width of the image, pixels; must be larger than the result.

    Raises ValueError if the pixel depends on nothing, or if the box touches the border, so that
    the field may be larger: always with group norm, whose statistics are those of the whole image.
    """

    def positive(name: str, shape: tuple[int, ...]) -> float:
        # Convolutions that average: no ReLU is dead, nothing cancels and nothing overflows.
        return 1 / math.prod(shape[:-1]) if name == "kernel" else float(name != "mean")

    model = model.clone(freeze_encoder=False, has_context=False)
    # A max-pool has a gradient for its winners alone: let them be the first pixels of all windows
    # in one image, and the last in the other.
    row, column = np.indices(size)
    rising = (1 + row + column).astype(np.float32) / sum(size)
    images = np.stack([rising, rising[::-1, ::-1]])[..., None].repeat(channels, axis=-1)
    variables = _constant(_shapes(model, images), positive)
    center = size[0] // 2, size[1] // 2

    def logits(image, variables):
        maps: Any = model.apply(variables, image, train=False)
        return maps[:, *center].sum()

    gradient = jax.jit(jax.grad(logits))(images, variables)
    reached = np.any(np.asarray(gradient), axis=(0, 3))
    box = []
    for axis, length in enumerate(size):
        inside = np.flatnonzero(reached.any(axis=1 - axis))
        if not len(inside):
            raise ValueError(f"the logits of pixel {center} depend on nothing (a bed of nails)")
        first, last = int(inside[0]), int(inside[-1])
        if first == 0 or last == length - 1:
            raise ValueError(
                f"the receptive field of pixel {center} reaches the border of an image of size "
                f"{size}: use a larger one (with group norm it is always the whole image)"
            )
        box.append(slice(first, last + 1))
    return box[0], box[1]


def _shapes(model: nn.Module, image: Any) -> Any:
    """The shapes of the model's variables."""
    return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)


def _constant(variables: Any, value: Callable[[str, tuple[int, ...]], float]) -> Any:
    """Arrays filled with value(name, shape), by the name of each, such as "kernel"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.full(x.shape, value(path[-1].key, x.shape), x.dtype), variables
    )


def _inside(tree: Any, path: Sequence[str]) -> Any:
    return functools.reduce(lambda tree, name: tree.get(name, {}), path, tree)


def _line(name: str, shape: Sequence[int], parameters: int, flops: int) -> tuple[str, ...]:
    return name, " x ".join(map(str, shape)), f"{parameters:,}", f"{flops:,}"


def _markdown(lines: Sequence[Sequence[str]], sides: str) -> str:
    """A table whose first line is the header; `sides` are "<" or ">", one for each column."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * (w - 1) + ("-" if s == "<" else ":") for w, s in zip(widths, sides, strict=True)]

    def join(cells):
        padded = (f"{cell:{s}{w}}" for cell, w, s in zip(cells, widths, sides, strict=True))
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(join, [lines[0], rule, *lines[1:]]))


def main(argv: list[str]) -> None:
    """Prints the table."""
    # Where XLA sees all FLOPs, and no accelerator is taken from a training.
    jax.config.update("jax_platforms", "cpu")
    args = flags.FLAGS
    if args.crossings:
        print(crossings(args.config.model))
        return
    print(table(models.build(args.config.model, args.num_classes), args.size, args.channels))
    args.config.num_seeds = 1  # on the one device that there is here
    print(f"\n{memory.table(args.config, args.num_classes, args.channels)}")


if __name__ == "__main__":
    command.define_config()
    flags.DEFINE_integer("num_classes", 21, "Channels of the logits.", lower_bound=1)
    flags.DEFINE_integer("channels", 3, "Of the image.", lower_bound=1)
    command.define_size("size", "224,224", "HEIGHT,WIDTH of the image, pixels.")
    flags.DEFINE_bool("crossings", False, "Print what can be combined instead.")
    command.run(main, flags_parser=command.parse_flags)
