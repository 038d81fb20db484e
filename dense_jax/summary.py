"""Summarizes a network and its training step before any training.

    python -m dense_jax.summary --config=experiments/unet_dice.py [--config.model.x=y]
    python -m dense_jax.summary --config=experiments/unet_dice.py --crossings

The first command prints the network's layers, and the memory and FLOPs that a training step of
`dense_jax.main` needs on each device. Images are assumed to have the size data.canvas_size or, if
unset, data.crop_size. The second command prints which encoders, decoders and upsampling methods are
compatible. All tables are Markdown. The commands read no images and allocate no parameters.
"""

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from flax import linen as nn
from ml_collections import ConfigDict

from dense_jax import command, models
from dense_jax.devices import cost, mesh, runtime
from dense_jax.models.decoders import DECODERS
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.upsampling import UPSAMPLERS, Upsampler
from dense_jax.program import assemble
from dense_jax.training import task


class Layer(NamedTuple):
    """The output shape and the cost of a module, excluding submodules.

    path: The module names from the network down to the module.
    shape: The shape of the output for one image.
    parameters: The number of parameters, excluding the running statistics of batch norm.
    flops: The number of floating-point operations for one image. A multiply-add counts as two.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int
    flops: int


def layers(model: models.Segmenter, variables: Any, image: jax.ShapeDtypeStruct) -> list[Layer]:
    """Returns a Layer for each module that holds parameters or upsamples, in execution order.

    variables: The model's variables or their shapes.
    image: The shape and dtype of an image, [1, h, w, c].

    The FLOPs come from XLA's cost analysis before any optimization; see `cost.flops`.
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

    rows: list[Layer] = []
    for module, args, output in calls:
        path = module.path
        if path not in parameters and not isinstance(module, Upsampler):
            continue
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        own = {
            name: functools.reduce(lambda tree, key: tree.get(key, {}), path, tree)
            for name, tree in variables.items()
        }
        flops = cost.flops(module.clone(parent=None).apply, own, *inputs) or 0
        flops -= sum(row.flops for row in rows if row.path[: len(path)] == path)
        rows.append(Layer(path, output.shape, parameters[path], flops))
    return rows


def layer_table(model: models.Segmenter, size: tuple[int, int], channels: int = 3) -> str:
    """Returns a Markdown table of the layers with a total row, followed by parameter counts.

    size: The height and width of the image in pixels.

    FLOPs are for one forward pass in evaluation mode. The total row also includes ReLUs, pooling
    and additive skips, which no layer's row includes.
    """
    image = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    init = functools.partial(model.init, train=False)
    variables: Any = jax.eval_shape(init, jax.random.key(0), image)
    rows = layers(model, variables, image)
    forward = functools.partial(model.apply, train=False)
    logits: Any = jax.eval_shape(forward, variables, image)
    total = sum(row.parameters for row in rows)  # without auxiliary heads
    flops = cost.flops(forward, variables, image) or 0
    lines = [
        (
            "/".join(row.path),
            " x ".join(map(str, row.shape)),
            f"{row.parameters:,}",
            f"{row.flops:,}",
        )
        for row in [*rows, Layer(("total",), logits.shape, total, flops)]
    ]
    encoder = sum(row.parameters for row in rows if row.path[0] == "encoder")
    halves = f"Parameters: {encoder:,} in the encoder, {total - encoder:,} in the decoder."
    return f"{_markdown([('layer', 'output', 'parameters', 'FLOPs'), *lines], '<>>>')}\n\n{halves}"


def training_cost(config: ConfigDict, num_classes: int, num_channels: int) -> dict[str, int]:
    """Returns the memory (see `cost.memory`) and FLOPs that a training step needs per device.

    The memory is in bytes, and excludes a training set in device memory (data.cache="device"). A
    multiply-add counts as two FLOPs.

    Raises ValueError if the seeds and the batch cannot be split evenly over the devices.
    """
    mesh.check_shares(config.num_seeds, config.batch_size, config.num_microbatches)
    fields = task.target_fields(config)
    training = task.bind(config, assemble(config, num_classes), num_channels, fields=fields)
    canvas = config.data.canvas_size or config.data.crop_size
    placed = task.place(config, training, task.batch_shapes(config, canvas, num_channels, fields))
    compiled = placed.train_step.lower(*placed.arguments, {}).compile()
    return cost.memory(compiled) | {"flops": int(compiled.cost_analysis()["flops"])}


def training_table(config: ConfigDict, num_classes: int, num_channels: int) -> str:
    """Returns `training_cost` as a Markdown table below a line that describes the devices."""
    needed = training_cost(config, num_classes, num_channels)
    work = f"{needed.pop('flops') / 1e9:,.1f} GFLOP"
    device, n = jax.devices()[0], jax.device_count()
    about = (
        f"A training step of {config.batch_size * config.num_seeds // n} images on each of {n} "
        f"{device.device_kind}, by XLA:{device.platform.upper()}'s analysis"
    )
    about += ": a GPU's or TPU's program is another." if device.platform == "cpu" else "."
    rows = [(name, f"{size / 1e6:,.1f} MB") for name, size in needed.items()]
    return f"{about}\n\n{_markdown([('per device', ''), *rows, ('work', work)], '<>')}"


def crossings(config: Any) -> str:
    """Returns a Markdown table of which encoders, decoders and upsampling methods are compatible.

    config: A `config.model`. Its encoder, decoder and upsampling method are ignored.

    Each entry is "yes" or the number of an error message below the table.
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
    for encoder, name in itertools.product(ENCODERS, DECODERS):
        cells = (cell(encoder=encoder, name=name, upsampling=method) for method in UPSAMPLERS)
        lines.append((encoder, name, *cells))
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([_markdown(lines, "<" * len(lines[0])), "", *notes])


def _markdown(lines: Sequence[Sequence[str]], sides: str) -> str:
    """Returns a Markdown table with the header lines[0] and the rows lines[1:].

    sides: The alignment of each column, "<" (left) or ">" (right).
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * (w - 1) + ("-" if s == "<" else ":") for w, s in zip(widths, sides, strict=True)]

    def join(cells):
        padded = (f"{cell:{s}{w}}" for cell, w, s in zip(cells, widths, sides, strict=True))
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(join, [lines[0], rule, *lines[1:]]))


def main(argv: list[str]) -> None:
    """Prints the tables that the flags select."""
    runtime.prepare()
    args: Any = flags.FLAGS
    config, num_classes, channels = args.config, args.num_classes, args.channels
    if args.crossings:
        print(crossings(config.model))
        return
    print(layer_table(models.build(config.model, num_classes), args.size, channels))
    if weights := ENCODERS[config.model.encoder].weights:
        print(
            f"Published weights: {weights.source} (license: {weights.license}); "
            f"normalization={weights.normalization!r}, images of {weights.input_size} pixels."
        )
    print(f"\n{training_table(config, num_classes, channels)}")


if __name__ == "__main__":
    command.define_config()
    flags.DEFINE_integer("num_classes", 21, "Number of classes.", lower_bound=1)
    flags.DEFINE_integer("channels", 3, "Number of image channels.", lower_bound=1)
    command.define_size("size", "224,224", "HEIGHT,WIDTH of the image in pixels.")
    flags.DEFINE_bool("crossings", False, "Print only which parts of a network are compatible.")
    command.run(main, flags_parser=command.parse_flags)
