"""Summarizes a network and its training step before any training.

    python -m dense_jax.summary --config=experiments/unet_dice.py [--config.model.x=y]
    python -m dense_jax.summary --config=experiments/unet_dice.py --topology=v5e-16 [--slices=2]
    python -m dense_jax.summary --config=experiments/unet_dice.py --crossings

The first command prints the network's layers, and the memory and FLOPs that a training step of
`dense_jax.main` needs on each device. Images are assumed to have the size data.canvas_size or, if
unset, data.crop_size. The second command compiles the training and the evaluation step for TPUs,
which need not be present, and prints the TPU compiler's estimates and the layers that take the most
time. It needs `pip install "jax[tpu]"`. The third command prints which encoders, decoders and upsampling methods are
compatible. In the same way, --encoders and --upsampling print tables of encoders and of upsampling
methods. All tables are Markdown. The commands read no images.
"""

from absl import flags

from dense_jax import command

if __name__ == "__main__":  # above the slow imports, so that --help answers at once
    command.define_config()
    flags.DEFINE_integer("num_classes", 21, "Number of classes.", lower_bound=1)
    flags.DEFINE_integer("channels", 3, "Number of image channels.", lower_bound=1)
    command.define_size("size", "224,224", "HEIGHT,WIDTH of the image in pixels.")
    flags.DEFINE_string("topology", "cpu", "TPUs to compile for, such as v5e-16 or v5e:4x4.")
    flags.DEFINE_integer("slices", 1, "Number of such TPU slices.", lower_bound=1)
    flags.DEFINE_bool("crossings", False, "Print only which parts of a network are compatible.")
    flags.DEFINE_bool("encoders", False, "Print only a table of all encoders.")
    flags.DEFINE_bool("upsampling", False, "Print only a table of all upsampling methods.")
    command.help_if_asked()

import copy
import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from dense_jax import models
from dense_jax.devices import cost, mesh, runtime, tpu_compiler
from dense_jax.evaluation.tables import markdown_table
from dense_jax.models.decoders import DECODERS
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.segmenter import Encoder
from dense_jax.models.upsampling import UPSAMPLERS, Upsampler, measures
from dense_jax.program import Program, assemble, jit_eval_step
from dense_jax.training import task

NUM_DEAREST = 10  # layers in the table of a TPU's program

# Options of upsampling methods that have their own rows in `upsampling_table`.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("transposed_conv", {"kernel_size": 3}),
    ("transposed_conv", {"init": "bilinear"}),
    ("pixel_shuffle", {"init": "icnr"}),
)


class Layer(NamedTuple):
    """The output shape of a module, and its cost without its submodules.

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
    lines = [("layer", "output", "parameters", "FLOPs"), *lines]
    return f"{markdown_table(lines, padded=True)}\n\n{halves}"


def training_cost(config: ConfigDict, num_classes: int, num_channels: int) -> dict[str, int]:
    """Returns the memory (see `cost.memory`) and FLOPs that a training step needs per device.

    The memory is in bytes, and excludes a training set in device memory (data.cache="device"). A
    multiply-add counts as two FLOPs.

    Raises ValueError if the seeds and the batch cannot be split evenly over the devices.
    """
    *_, compiled = _training_step(config, assemble(config, num_classes), num_classes, num_channels)
    return cost.memory(compiled) | {"flops": int(compiled.cost_analysis()["flops"])}


def _training_step(
    config: ConfigDict,
    program: Program,
    num_classes: int,
    num_channels: int,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[task.Training, dict[str, jax.ShapeDtypeStruct], Any]:
    """Compiles the training step. Returns its functions and its batch's shapes, too."""
    mesh.check_shares(config.num_seeds, config.batch_size, config.num_microbatches, devices)
    fields = task.target_fields(config, num_classes)
    training = task.bind(config, program, num_channels, fields=fields)
    canvas = config.data.canvas_size or config.data.crop_size
    batch = task.batch_shapes(config, canvas, num_channels, fields)
    placed = task.place(config, training, batch, devices)
    return training, batch, placed.train_step.lower(*placed.arguments, {}).compile()


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
    return f"{about}\n\n{markdown_table([('per device', ''), *rows, ('work', work)], padded=True)}"


class Step(NamedTuple):
    """A step that is compiled for TPUs.

    flops: The FLOPs of all devices together, as the step is written. The compiler may add some.
    num_images: The number of images on all devices together.
    """

    name: str
    compiled: Any
    flops: int
    num_images: int


def tpu_steps(
    config: ConfigDict, num_classes: int, num_channels: int, devices: Sequence[jax.Device]
) -> Iterator[Step]:
    """Compiles the training step and then the evaluation step for devices that may be absent.

    Raises ValueError if the seeds and the batch cannot be split evenly over the devices.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot be read without a TPU
    program = assemble(config, num_classes)
    with runtime.announced("compiling the training step"):
        training, batch, compiled = _training_step(
            config, program, num_classes, num_channels, devices
        )
    key = jax.eval_shape(jax.random.key, 0)
    flops = cost.flops(training.train_step, training.shapes(), batch, key, {}) or 0
    n = config.num_seeds
    yield Step("training step", compiled, n * flops, n * config.batch_size)

    all_devices = mesh.make_mesh(devices=devices)
    n = -(-config.eval.batch_size // all_devices.size) * all_devices.size
    examples = {
        name: jax.ShapeDtypeStruct((n, *batch[name].shape[1:]), batch[name].dtype)
        for name in ("image", "label", "index")
    }
    variables = program.variables(num_channels)
    image = jax.ShapeDtypeStruct(batch["image"].shape[1:], batch["image"].dtype)
    flops = cost.flops(program.logits_step, variables, image) or 0
    arguments = (
        mesh.placed(variables, mesh.replicated(all_devices)),
        mesh.placed(examples, mesh.sharded(all_devices)),
    )
    with runtime.announced("compiling the evaluation step"):
        compiled = jit_eval_step(program, all_devices).lower(*arguments).compile()
    yield Step("evaluation step", compiled, n * flops, n)


def tpu_row(step: Step, num_devices: int, chip: tpu_compiler.Chip) -> dict[str, str]:
    """Returns {column: text} with the TPU compiler's estimates for a step."""
    memory = cost.memory(step.compiled)
    fits = "fits" if memory["peak"] <= chip.memory else "does NOT fit"
    cycles = sum(i.cycles for i in tpu_compiler.instructions(step.compiled))
    seconds = cycles / chip.clock
    flops = step.flops / num_devices
    found = tpu_compiler.collectives(step.compiled)
    return {
        **{name: f"{size / 1e6:,.1f} MB" for name, size in memory.items()},
        "memory": f"{fits} in {chip.memory / 1e9:.1f} GB",
        "work": f"{flops / 1e9:,.1f} GFLOP",
        "cycles": f"{cycles / 1e6:,.2f} M",
        "time": f"{1e3 * seconds:,.2f} ms",
        "images per second": f"{step.num_images / seconds:,.0f} on all devices",
        "of the peak": f"{100 * flops / seconds / chip.peak:.1f} %",
        "collectives": ", ".join(
            f"{number} {kind} ({size / 1e6:,.2f} MB)" for kind, (number, size) in found.items()
        ),
    }


def tpu_layer_table(compiled: Any, chip: tpu_compiler.Chip) -> str:
    """Returns a Markdown table of the layers that take the most time of a program for a TPU."""
    cycles: dict[str, Counter[str]] = defaultdict(Counter)
    for instruction in tpu_compiler.instructions(compiled):
        cycles[tpu_compiler.layer(instruction.path)][instruction.kind] += instruction.cycles
    total = sum(kinds.total() for kinds in cycles.values())
    dearest = sorted(cycles.items(), key=lambda item: -item[1].total())[:NUM_DEAREST]
    lines = [("layer", "time", "share", "spent on")]
    for name, kinds in dearest:
        own = kinds.total()
        parts = (f"{100 * part / own:.0f} % {kind}" for kind, part in kinds.most_common())
        time, share = f"{1e3 * own / chip.clock:.2f} ms", f"{100 * own / total:.1f} %"
        lines.append((name, time, share, ", ".join(parts)))
    return markdown_table(lines, padded=True)


def tpu_tables(
    config: ConfigDict, num_classes: int, num_channels: int, topology: str, num_slices: int = 1
) -> Iterator[str]:
    """Yields the Markdown tables of both steps for TPUs; see `tpu_compiler.describe`.

    A batch that cannot be split evenly over the devices is enlarged until it can.
    """
    devices, chip = tpu_compiler.describe(topology, num_slices)
    config, given = copy.deepcopy(config), config.batch_size
    share = max(1, len(devices) // config.num_seeds) * config.num_microbatches
    config.batch_size = -(-given // share) * share
    steps = list(tpu_steps(config, num_classes, num_channels, devices))
    rows = [tpu_row(step, len(devices), chip) for step in steps]
    instead = f" instead of {given}" if given != config.batch_size else ""
    yield (
        f"For {len(devices)} devices ({devices[0].device_kind}, {num_slices} x {topology}), with "
        f"batch_size={config.batch_size}{instead}, by the TPU compiler's estimates. The time "
        "excludes that of collectives."
    )
    lines = [(name, *(row[name] for row in rows)) for name in rows[0]]
    yield markdown_table([("per device", *(step.name for step in steps)), *lines], padded=True)
    yield tpu_layer_table(steps[0].compiled, chip)


def crossings(config: Any) -> str:
    """Returns a Markdown table of which decoders, encoders and upsampling methods are compatible.

    config: A `config.model`. Its encoder, decoder and upsampling method are ignored.

    Each entry is "yes" or the number of an error message below the table. Names with the same
    entries are merged: a row may list several decoders or encoders, and a column several methods.
    """

    def answer(fields: Mapping[str, str]) -> str:
        try:
            models.build(_with(config, fields), num_classes=2)
        except ValueError as error:
            return str(error)
        return "yes"

    combinations = itertools.product(DECODERS, ENCODERS, UPSAMPLERS)
    fields = "name", "encoder", "upsampling"
    answers: dict[tuple[str, ...], str] = {
        names: answer(dict(zip(fields, names, strict=True))) for names in combinations
    }

    def alike(position: int, *others: Iterable[str]) -> list[list[str]]:
        """Returns the names of decoders (position 0), encoders (1) or methods (2), in groups.

        Names in a group get the same answers in all combinations with `others`.
        """
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in (DECODERS, ENCODERS, UPSAMPLERS)[position]:
            names = itertools.product(*others[:position], [name], *others[position:])
            groups.setdefault(tuple(answers[n] for n in names), []).append(name)
        return list(groups.values())

    methods = alike(2, DECODERS, ENCODERS)
    most = max(methods, key=len)
    columns = ["all other methods" if group is most else ", ".join(group) for group in methods]
    lines, reasons = [("decoder", "encoder", *columns)], ["yes"]
    for decoders in alike(0, ENCODERS, UPSAMPLERS):
        for encoders in alike(1, decoders[:1], UPSAMPLERS):
            row = [answers[decoders[0], encoders[0], group[0]] for group in methods]
            reasons += [reason for reason in row if reason not in reasons]
            entries = (str(reasons.index(reason) or "yes") for reason in row)
            named = "all" if len(encoders) == len(ENCODERS) else ", ".join(encoders)
            lines.append((", ".join(decoders), named, *entries))
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons[1:], 1)]
    return "\n".join([markdown_table(lines, len(lines[0]), padded=True), "", *notes])


def upsampling_table(config: Any) -> str:
    """Returns a Markdown table of the cost, evenness and receptive field of upsampling methods.

    config: A `config.model`. Its upsampling method with its options gets an additional row.

    Each method upsamples 128 channels of 64 x 64 pixels to 64 channels of 128 x 128 pixels.
    docs/models.md explains the columns; see also `measures`.
    """
    models.build(config, num_classes=2)  # raises if an option has an invalid value
    own = {name: value for name, value in config.upsampling_options.items() if value is not None}
    ways = [*((method, {}) for method in UPSAMPLERS), *VARIANTS, (config.upsampling, own)]
    head = "method", "parameters", "MFLOPs", "kept MB", "coverage", "receptive field", "at start"
    rows = {}
    for method, options in ways:
        label = ", ".join([method, *(f"{name}={value}" for name, value in options.items())])
        if label not in rows:
            rows[label] = label, *upsampling_row(functools.partial(UPSAMPLERS[method], **options))
    return markdown_table([head, *rows.values()], padded=True)


def upsampling_row(make: Callable[..., Upsampler]) -> Iterable[str]:
    """Yields the numbers of one row of `upsampling_table`. Those that take long come last."""
    up = make(features=64)
    x, switches = (
        jax.ShapeDtypeStruct((1, 64, 64, channels), dtype)
        for channels, dtype in ((2 * up.features, jnp.float32), (up.features, jnp.int32))
    )
    variables: Any = jax.eval_shape(up.init, jax.random.key(0), x, switches)
    yield f"{sum(x.size for x in jax.tree.leaves(variables)):,}"
    yield f"{(cost.flops(up.apply, variables, x, switches) or 0) / 1e6:,.1f}"
    yield f"{measures.kept_bytes(up, x, switches) / 1e6:,.1f}"
    yield f"{measures.checkerboard_index(up):.2f}"
    yield str(measures.receptive_field(make(features=4)))
    # With many channels, the index hardly depends on the random weights.
    yield f"{measures.checkerboard_index(make(features=256), initial=True):.1f}"


def encoder_table(config: Any, names: Iterable[str] = tuple(ENCODERS)) -> str:
    """Returns a Markdown table of the feature maps, published weights and sizes of encoders.

    config: A `config.model`. Its encoder is ignored.
    """
    lines: list[tuple[str, ...]] = [
        ("encoder", "channels at each stride", "published weights", "input", "parameters")
    ]
    for name in names:
        encoder, weights = (
            models.build(_with(config, {"encoder": name}), 2).encoder,
            ENCODERS[name].weights,
        )
        image = jax.ShapeDtypeStruct((1, *2 * (encoder.spec.strides[-1],), 3), jnp.float32)

        def features(image: jax.Array, encoder: Encoder = encoder) -> Any:
            pyramid, variables = encoder.init_with_output(jax.random.key(0), image, train=False)
            return pyramid.features, variables["params"]

        maps, params = jax.eval_shape(features, image)
        count = sum(x.size for x in jax.tree.leaves(params)) / 1e6
        channels = (f"{stride}: {x.shape[-1]}" for stride, x in maps.items())
        about = (weights.license, weights.normalization) if weights else ("none", "")
        lines.append((name, ", ".join(channels), *about, f"{count:.1f} M"))
    return markdown_table(lines, 4, padded=True)


def _with(config: Any, fields: Mapping[str, str]) -> Any:
    """Returns a copy of a `config.model`, with new values from `fields`."""
    changed = copy.deepcopy(config)
    changed.update(fields)
    return changed


# The tables that flags select, as functions of `config.model`.
TABLES: dict[str, Callable[[Any], str]] = {
    "crossings": crossings,
    "encoders": encoder_table,
    "upsampling": upsampling_table,
}


def main(argv: list[str]) -> None:
    """Prints the tables that the flags select."""
    runtime.prepare()
    args: Any = flags.FLAGS
    config, num_classes, channels = args.config, args.num_classes, args.channels
    chosen = [table for name, table in TABLES.items() if args[name].value]
    if chosen:
        print("\n\n".join(table(config.model) for table in chosen))
        return
    print(layer_table(models.build(config.model, num_classes), args.size, channels))
    if weights := ENCODERS[config.model.encoder].weights:
        print(
            f"Published weights: {weights.source} (license: {weights.license}); "
            f"normalization={weights.normalization!r}, images of {weights.input_size} pixels."
        )
    if args.topology != "cpu":
        for table in tpu_tables(config, num_classes, channels, args.topology, args.slices):
            print(f"\n{table}")
        return
    print(f"\n{training_table(config, num_classes, channels)}")


if __name__ == "__main__":
    command.run(main, flags_parser=command.parse_flags)
