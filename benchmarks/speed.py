"""Compares the speed of training and prediction to PyTorch: python -m benchmarks.speed

Writes the tables that benchmarks/speed.md discusses, one page per platform and version of JAX. For
each network, checks that our version and the PyTorch version (`torch_models`) compute the same
logits, and then times the two alternately. Without `torch`, times only our networks. On an
accelerator, networks compute in bfloat16, PyTorch uses autocast and compilation, and images are
larger. On a GPU, set XLA_PYTHON_CLIENT_PREALLOCATE=false to leave memory for PyTorch.
"""

import argparse
import datetime
import functools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import roofline
from benchmarks.conformance import table
from benchmarks.pipeline import hardware, versions
from dense_jax import losses, metrics, models
from dense_jax.data.workers import processor_cores
from dense_jax.devices import cost, cpu, mesh
from dense_jax.devices import runtime as startup
from dense_jax.models.normalization import unit
from dense_jax.program import assemble
from dense_jax.training import optim, steps
from experiments import base, fcn8s_vgg16, segnet_basic, unet_resnet34

try:
    from benchmarks import torch_models
except ImportError:
    torch_models = None

NUM_CLASSES = 11
LOSSES = ("cross_entropy", "soft_dice", "dice_ce")
Steps = Mapping[str, Callable[[], Any]]


def unet(width: int, **fields: Any) -> Any:
    config = base.get_config()
    config.model.widths = (width, 2 * width, 4 * width, 8 * width)
    config.model.update(fields)
    return config


def fcn8s() -> Any:
    config = fcn8s_vgg16.get_config()
    config.model.width_multiplier = 0.25
    config.model.zero_init = False  # all logits would be 0, with nothing to compare
    return config


# Network name -> (config, batch size on a CPU, image height and width on a CPU in pixels).
MODELS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "unet16": (functools.partial(unet, 16), 4, 128),
    "unet32": (functools.partial(unet, 32), 4, 128),
    "unet64": (functools.partial(unet, 64), 2, 128),
    "fcn8s_vgg16": (fcn8s, 4, 128),
    "segnet_basic": (segnet_basic.get_config, 2, 128),
    "unet_resnet34": (unet_resnet34.get_config, 4, 128),
}

LAYERS_OF = "unet64"


def network(name: str) -> tuple[Any, int, int]:
    """Returns a network's config, batch size and image size (height and width) on this platform."""
    make, batch_size, size = MODELS[name]
    config = make()
    if is_accelerated():
        config.model.dtype, batch_size, size = "bfloat16", 16, 512
    return config, batch_size, size


def is_accelerated() -> bool:
    return jax.default_backend() != "cpu"


class Ours:
    """A network's training step and prediction on a batch, over all devices."""

    def __init__(self, config: Any, batch_size: int, size: int):
        program = assemble(config, NUM_CLASSES)
        self.model = program.model
        self.devices = mesh.make_mesh()
        rng = np.random.default_rng(0)
        shape = (batch_size, size, size)
        self.batch = {
            "image": rng.integers(0, 256, (*shape, 3), np.uint8),
            "label": rng.integers(0, NUM_CLASSES, shape, np.uint8),
            "index": np.arange(batch_size, dtype=np.uint32),
        }
        tx = optim.make_optimizer(
            "adamw", lambda _: 1e-3, momentum=0.9, weight_decay=1e-4, grad_clip_norm=1.0
        )
        train_step = cpu.fast(
            functools.partial(
                steps.train_step,
                model=self.model,
                tx=tx,
                loss_fn=losses.cross_entropy,
                augment=lambda _, example: {name: example[name] for name in ("image", "label")},
                normalize=unit,
            )
        )
        whole, split = mesh.replicated(self.devices), mesh.sharded(self.devices)
        init = functools.partial(
            steps.init_state,
            init=functools.partial(program.init, num_channels=3),
            tx=tx,
            with_ema=False,
        )
        self._key = jax.device_put(jax.random.key(0), whole)
        self._state = jax.jit(init, out_shardings=whole)(self._key)
        self.variables = jax.tree.map(jnp.copy, self._state.variables())
        placed = jax.device_put(self.batch, split)
        start = time.perf_counter()
        self.program: Any = (
            jax.jit(train_step, donate_argnums=0, out_shardings=whole)
            .lower(self._state, placed, self._key)
            .compile()
        )
        self.compile_seconds = time.perf_counter() - start
        predict = jax.jit(
            cpu.fast(lambda variables, image: jnp.argmax(self.logits(variables, image), axis=-1))
        )
        self._placed, self._predict = placed, predict
        self._evaluate = jax.jit(mesh.map_examples(program.eval_step, self.devices))

    def logits(self, variables: Any, image: jax.Array) -> jax.Array:
        return self.model.apply(variables, unit(image), train=False)

    def train(self) -> None:
        self._state, values = self.program(self._state, self._placed, self._key)
        jax.block_until_ready((self._state, values))

    def predict(self) -> None:
        self._predict(self.variables, self._placed["image"]).block_until_ready()

    def evaluate(self) -> None:
        jax.block_until_ready(self._evaluate(self.variables, self._placed))

    def flops(self) -> int:
        """Returns the FLOPs to predict the batch. Training needs about three times as many."""
        return cost.flops(self.logits, self.variables, self.batch["image"]) or 0


class Times(NamedTuple):
    """The median wall time and processor time of a call in one round, in seconds."""

    wall: float
    processor: float  # summed over all threads


def measure(rows: Steps, args: argparse.Namespace) -> dict[str, list[Times]]:
    """Times each row in each round. Returns {row name: one `Times` per round}."""
    times: dict[str, list[Times]] = {name: [] for name in rows}
    for call in rows.values():
        call()
    for _ in range(args.rounds):
        for name, call in rows.items():
            call()  # warms the CPU caches, which still hold the previous row's data
            calls = []
            for _ in range(args.calls):
                wall, processor = time.perf_counter(), time.process_time()
                call()
                calls.append((time.perf_counter() - wall, time.process_time() - processor))
            times[name].append(Times(*map(statistics.median, zip(*calls, strict=True))))
    return times


def typical(times: Mapping[str, Sequence[Times]]) -> dict[str, float]:
    """Returns the median wall time of each row over all rounds, in seconds."""
    return {name: statistics.median(each.wall for each in of) for name, of in times.items()}


class Machine(NamedTuple):
    """A matrix product and a copy, which run on all devices to measure the machine's speed."""

    calls: Steps
    flops: float  # of the matrix product
    moved: float  # the bytes that the copy moves

    def rates(self, seconds: Mapping[str, float]) -> tuple[float, float]:
        """Returns the machine's FLOPs per second and bytes per second."""
        return self.flops / seconds["product"], self.moved / seconds["copy"]


def machine() -> Machine:
    devices, split = jax.device_count(), mesh.sharded(mesh.make_mesh())
    side, size, dtype = (8192, 2**28, "bfloat16") if is_accelerated() else (1024, 2**24, "float32")
    square = jax.device_put(jnp.ones((devices, side, side), dtype), split)
    array = jax.device_put(jnp.ones((devices, size // devices), dtype), split)
    product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
    calls = {
        "product": lambda: product(square).block_until_ready(),
        "copy": lambda: copy(array).block_until_ready(),
    }
    return Machine(calls, 2 * devices * side**3, 2 * array.nbytes)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Formats the median and the range of the values."""
    low, middle, high = (f(values) for f in (min, statistics.median, max))
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def ratios(times: Mapping[str, Sequence[Times]], row: str, of: str) -> str:
    """Formats the ratio of PyTorch's time to ours: the median and range over all rounds.

    of: The field of `Times` to compare.
    """
    pairs = zip(times[row], times[f"{row}, torch"], strict=True)
    return spread([getattr(theirs, of) / getattr(ours, of) for ours, theirs in pairs])


def check_same(ours: Ours, theirs: Any) -> None:
    """Raises ValueError unless the logits of both networks are equal up to rounding.

    Ignores the largest 1 % of the differences, because rounding may change the argmax of a
    max-pool, so that max-unpooling fills a different pixel.
    """
    expected = np.asarray(jax.jit(ours.logits)(ours.variables, ours.batch["image"]))
    difference = np.quantile(np.abs(theirs.logits() - expected), 0.99) / np.abs(expected).max()
    if difference > (0.03 if is_accelerated() else 1e-3):
        raise ValueError(f"the twins differ by {difference:.1e} of the largest logit")


def compare(name: str, args: argparse.Namespace) -> dict[str, list[str]]:
    """Measures a network. Returns its row in each of TABLES, as {title: row}."""
    config, batch_size, size = network(name)
    ours, n, speeds = Ours(config, batch_size, size), jax.device_count(), machine()
    rows = {"train": ours.train, "predict": ours.predict, "evaluate": ours.evaluate}
    peaks = {"ours": n * cost.memory(ours.program)["peak"]}
    if torch_models:
        theirs = torch_models.Twin(ours.model, ours.variables, ours.batch, on_gpu=is_accelerated())
        check_same(ours, theirs)
        rows |= {"train, torch": theirs.train, "predict, torch": theirs.predict}
        peaks["torch"] = theirs.peak_bytes()
    parts = overheads(ours)
    times = measure(rows | speeds.calls | parts, args)
    seconds = typical(times)
    flops, (product_rate, copy_rate) = ours.flops(), speeds.rates(seconds)

    def speed(row: str, passes: int) -> list[str]:
        theirs, both = "", ("", "")
        if torch_models:
            theirs = f"{batch_size / seconds[f'{row}, torch']:.1f}"
            both = (ratios(times, row, of) for of in Times._fields)
        share = passes * flops / seconds[row] / product_rate
        return [f"{batch_size / seconds[row]:.1f}", theirs, *both, f"{100 * share:.0f} %"]

    moved = n * ours.program.cost_analysis()["bytes accessed"]
    needs = [
        *(f"{peaks[side] / 1e6:.0f}" if side in peaks else "" for side in ("ours", "torch")),
        f"{ours.compile_seconds:.0f}",
        f"{3 * flops / 1e9:.1f}",
        f"{3 * flops / seconds['train'] / 1e9:.0f}",
        f"{product_rate / 1e9:.0f}",
        f"{moved / seconds['train'] / 1e9:.1f}",
        f"{copy_rate / 1e9:.1f}",
    ]
    batch = f"{batch_size} x {size}²"
    found = {
        "Training": [name, batch, *speed("train", 3)],
        "Prediction": [
            *(name, batch, *speed("predict", 1)),
            f"{batch_size / seconds['evaluate']:.1f}",
        ],
        "Needs of training": [name, batch, *needs],
        "Losses and confusion matrix": [
            *(name, batch, f"{1000 * seconds['train']:.0f}"),
            *(f"{100 * seconds[part] / seconds['train']:.1f} %" for part in parts),
        ],
    }
    print(found, flush=True)
    return found


def overheads(ours: Ours) -> Steps:
    """Returns functions that compute each loss with its gradient, and the confusion matrix."""
    logits = jax.jit(ours.logits)(ours.variables, ours.batch["image"])
    label = jnp.asarray(ours.batch["label"])

    def call(function: Callable) -> Callable[[], Any]:
        jitted = jax.jit(function)
        return lambda: jax.block_until_ready(jitted(logits, label))

    parts = {loss: call(jax.value_and_grad(losses.LOSSES[loss])) for loss in LOSSES}
    return parts | {
        "confusion matrix": call(
            lambda x, y: metrics.confusion_matrix(jnp.argmax(x, axis=-1), y, NUM_CLASSES)
        )
    }


def layers(args: argparse.Namespace) -> list[list[str]]:
    """Returns the table of the layers of the network LAYERS_OF; see `roofline`."""
    config, batch_size, size = network(LAYERS_OF)
    speeds = machine()
    return roofline.rows(
        models.build(config.model, NUM_CLASSES),
        jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32),
        lambda calls: typical(measure(calls, args)),
        *speeds.rates(typical(measure(speeds.calls, args))),
    )


def growth(args: argparse.Namespace) -> list[list[str]]:
    """Returns table rows: the costs of a U-Net of width 16 by batch size and image size."""
    rows = []
    for batch_size, size in ((2, 64), (8, 64), (2, 128), (2, 256)):
        ours, pixels = Ours(unet(16), batch_size, size), batch_size * size**2
        [seconds] = typical(measure({"train": ours.train}, args)).values()
        peak = jax.device_count() * cost.memory(ours.program)["peak"]
        per_pixel = (1e9 * seconds, ours.flops(), peak)
        rows.append(
            [f"{batch_size} x {size}²", f"{1000 * seconds:.0f}"]
            + [f"{each / pixels:.0f}" for each in per_pixel]
        )
    return rows


TABLES = {
    "Training": (
        *("network", "batch", "images/s", "PyTorch", "ratio", "of processor time"),
        "of matmul rate",
    ),
    "Prediction": (
        *("network", "batch", "images/s", "PyTorch", "ratio", "of processor time"),
        *("of matmul rate", "evaluation, images/s"),
    ),
    "Needs of training": (
        *("network", "batch", "peak, MB", "PyTorch", "compiling, s", "GFLOP", "GFLOP/s"),
        *("of matmul", "GB/s", "of copy"),
    ),
    "Losses and confusion matrix": (
        *("network", "batch", "ms per step", *LOSSES, "confusion matrix"),
    ),
}
PAGE = """# {title}

What the columns mean: [speed.md](speed.md). By `{command}`, on {date},
on {hardware} ({cores} to use, {devices} JAX device(s), load average {load:.1f} at
the start), with {versions}.

{tables}
## Layers of {layers_of}

{layers}
## Growth

U-Net of width 16, training; FLOPs of prediction; bytes are the peak's.

{growth}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=3, help="calls per row and round")
    args = parser.parse_args()
    startup.keep_memory()
    load = os.getloadavg()[0]
    found = [compare(name, args) for name in args.models]
    version = ".".join(jax.__version__.split(".")[:2])
    page = PAGE.format(
        title=f"Speed with JAX {version} on a {jax.default_backend().upper()}",
        command=" ".join(["python -m benchmarks.speed", *sys.argv[1:]]),
        date=datetime.date.today(),
        hardware=hardware(),
        cores=len(processor_cores()),
        devices=jax.device_count(),
        load=load,
        versions=versions(),
        tables="\n".join(
            f"## {title}\n\n{table(columns, [rows[title] for rows in found])}"
            for title, columns in TABLES.items()
        ),
        layers_of=LAYERS_OF,
        layers=table(roofline.COLUMNS, layers(args)),
        growth=table(
            ("batch", "ms", "ns/pixel", "FLOP/pixel", "bytes/pixel"),
            growth(args),
        ),
    )
    name = f"speed_{jax.default_backend()}_jax{version}.md"
    pathlib.Path(__file__).with_name(name).write_text(page)
    print(page)


if __name__ == "__main__":
    main()
