"""How fast training and prediction are, next to PyTorch: python -m benchmarks.speed

Writes benchmarks/speed.md: for each network the training step and the prediction of a batch, in
turns with the same function in PyTorch (`torch_models`; only ours without `torch`), after it was
checked that both give the same logits. Both are set up as our commands are (`startup`). What the
tables mean, and what bounds the numbers, is written by hand in NOTES.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.conformance import table
from benchmarks.pipeline import hardware, versions
from dense_jax import cost, losses, mesh, metrics, models, optim, startup, steps
from dense_jax.normalise import unit
from experiments import base, fcn8s_vgg16, segnet_basic, unet_resnet34

try:
    from benchmarks import torch_models
except ImportError:
    torch_models = None

PAGE = pathlib.Path(__file__).with_suffix(".md")
NUM_CLASSES = 11
NOTES = pathlib.Path(__file__).with_name("speed_notes.md")
Steps = Mapping[str, Callable[[], Any]]


def unet(width: int, **fields: Any) -> Any:
    config = base.get_config()
    config.model.widths = (width, 2 * width, 4 * width, 8 * width)
    config.model.update(fields)
    return config


def fcn8s() -> Any:
    config = fcn8s_vgg16.get_config()
    config.model.width_multiplier = 0.25
    config.model.zero_init = False  # or there would be nothing to compare
    return config


# By name: the config, images in a batch, and their height and width in pixels.
MODELS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "unet16": (functools.partial(unet, 16), 4, 128),
    "unet32": (functools.partial(unet, 32), 4, 128),
    "unet64": (functools.partial(unet, 64), 2, 128),
    "fcn8s_vgg16": (fcn8s, 4, 128),
    "segnet_basic": (segnet_basic.get_config, 2, 128),
    "unet_resnet34": (unet_resnet34.get_config, 4, 128),
}


class Ours:
    """A network's training step and prediction on a batch, over all devices."""

    def __init__(self, config: Any, batch_size: int, size: int):
        self.model = models.build(config.model, NUM_CLASSES)
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
        train_step = steps.make_train_step(
            self.model,
            tx,
            losses.cross_entropy,
            lambda _, example: {name: example[name] for name in ("image", "label")},
            unit,
        )
        whole, split = mesh.replicated(self.devices), mesh.sharded(self.devices)
        init = functools.partial(
            steps.init_state, self.model, tx, normalise=unit, num_channels=3, with_ema=False
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
            lambda variables, image: jnp.argmax(self.logits(variables, image), axis=-1)
        )
        self._placed, self._predict = placed, predict
        evaluate = steps.make_eval_step(
            steps.make_predict_step(self.model, unit),
            functools.partial(metrics.confusion_matrix, num_classes=NUM_CLASSES),
        )
        self._evaluate = jax.jit(mesh.map_examples(evaluate, self.devices))

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
        """Of the prediction of the batch; a training step is taken as three times that."""
        return cost.flops(self.logits, self.variables, self.batch["image"]) or 0


def measure(rows: Steps, rounds: int, calls: int) -> dict[str, list[float]]:
    """Seconds per call of each row, the median of its calls in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for call in rows.values():
        call()
    for _ in range(rounds):
        for name, call in rows.items():
            call()  # what the row before left in the caches is gone
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            seconds[name].append(statistics.median(times))
    return seconds


def machine(devices: int) -> Steps:
    """Matrix products of 1024 x 1024 and copies of 64 MB, on as many devices as the networks use."""
    split = mesh.sharded(mesh.make_mesh())
    square = jax.device_put(jnp.ones((devices, 1024, 1024)), split)
    array = jax.device_put(jnp.ones((devices, 2**24 // devices)), split)
    product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
    return {
        "product": lambda: product(square).block_until_ready(),
        "copy": lambda: copy(array).block_until_ready(),
    }


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median and range."""
    low, middle, high = (f(values) for f in (min, statistics.median, max))
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def ratios(seconds: Mapping[str, list[float]], name: str) -> str:
    """PyTorch's seconds over ours, in each round."""
    theirs = seconds.get(f"{name}, torch")
    if not theirs:
        return ""
    return spread([b / a for a, b in zip(seconds[name], theirs, strict=True)])


def check_same(ours: Ours, theirs: Any) -> float:
    """The largest difference of the twins' logits, relative to the largest logit."""
    expected = np.asarray(jax.jit(ours.logits)(ours.variables, ours.batch["image"]))
    difference = float(np.abs(theirs.logits() - expected).max() / np.abs(expected).max())
    if difference > 1e-3:
        raise ValueError(f"the twins differ by {difference:.1e} of the largest logit")
    return difference


def compare(name: str, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """A network's rows of the tables of speed and of memory."""
    make, batch_size, size = MODELS[name]
    ours = Ours(make(), batch_size, size)
    rows = {"train": ours.train, "predict": ours.predict, "evaluate": ours.evaluate}
    peak_theirs = ""
    if torch_models:
        theirs = torch_models.Twin(ours.model, ours.variables, ours.batch)
        check_same(ours, theirs)
        peak_theirs = f"{theirs.peak_bytes() / 1e6:.0f}"
        rows |= {"train, torch": theirs.train, "predict, torch": theirs.predict}
    num_devices = jax.device_count()
    seconds = measure(rows | machine(num_devices), args.rounds, args.calls)
    typical = {row: statistics.median(times) for row, times in seconds.items()}
    flops = ours.flops()
    peak_rate = 2 * 1024**3 * num_devices / typical["product"]
    moved = num_devices * ours.program.cost_analysis()["bytes accessed"]
    speed = [
        name,
        f"{batch_size} x {size}²",
        *(
            text
            for row, times in (("train", 3), ("predict", 1))
            for text in (
                f"{batch_size / typical[row]:.1f}",
                f"{batch_size / typical[f'{row}, torch']:.1f}" if peak_theirs else "",
                ratios(seconds, row),
                f"{100 * times * flops / typical[row] / peak_rate:.0f} %",
            )
        ),
        f"{batch_size / typical['evaluate']:.1f}",
    ]
    with_remat = make()
    if name != "fcn8s_vgg16":  # whose decoder has none
        with_remat.model.remat = True
    memory = [
        name,
        f"{num_devices * cost.memory(ours.program)['peak'] / 1e6:.0f}",
        f"{num_devices * cost.memory(Ours(with_remat, batch_size, size).program)['peak'] / 1e6:.0f}",
        peak_theirs,
        f"{ours.compile_seconds:.0f}",
        f"{3 * flops / typical['train'] / 1e9:.0f}",
        f"{peak_rate / 1e9:.0f}",
        f"{moved / typical['train'] / 1e9:.0f}",
        f"{2 * 2**26 / typical['copy'] / 1e9:.0f}",
    ]
    print(dict(zip(("speed", "memory"), (speed, memory), strict=True)), flush=True)
    return speed, memory


def overheads(args: argparse.Namespace) -> list[list[str]]:
    """Loss with gradient, and confusion matrix, as a part of the training step."""
    rows = []
    for name in [name for name in ("unet16", "unet64") if name in args.models]:
        make, batch_size, size = MODELS[name]
        ours = Ours(make(), batch_size, size)
        logits = jax.jit(ours.logits)(ours.variables, ours.batch["image"])
        label, parts = jnp.asarray(ours.batch["label"]), {"train": ours.train}
        for loss in ("cross_entropy", "soft_dice", "dice_ce"):
            gradient = jax.jit(jax.value_and_grad(losses.LOSSES[loss]))
            parts[loss] = functools.partial(
                lambda f: jax.block_until_ready(f(logits, label)), gradient
            )
        count = jax.jit(
            lambda x, y: metrics.confusion_matrix(jnp.argmax(x, axis=-1), y, NUM_CLASSES)
        )
        parts["confusion_matrix"] = lambda: count(logits, label).block_until_ready()
        seconds = measure(parts, args.rounds, args.calls)
        typical = {part: statistics.median(times) for part, times in seconds.items()}
        shares = (
            f"{1000 * typical[part]:.1f} ms, {100 * typical[part] / typical['train']:.1f} %"
            for part in list(parts)[1:]
        )
        rows.append([name, f"{1000 * typical['train']:.0f} ms", *shares])
    return rows


def growth(args: argparse.Namespace) -> list[list[str]]:
    """U-Net of width 16 by batch and size."""
    rows = []
    for batch_size, size in ((2, 64), (4, 64), (8, 64), (2, 128), (4, 128), (2, 256)):
        ours = Ours(unet(16), batch_size, size)
        [times] = measure({"train": ours.train}, args.rounds, args.calls).values()
        pixels, seconds = batch_size * size**2, statistics.median(times)
        peak = jax.device_count() * cost.memory(ours.program)["peak"]
        rows.append(
            [f"{batch_size} x {size}²", f"{1000 * seconds:.0f}"]
            + [f"{n / pixels:.{d}f}" for n, d in ((1e9 * seconds, 0), (ours.flops(), 0), (peak, 0))]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=3, help="of each row in each round")
    args = parser.parse_args()
    startup.keep_memory()
    load = os.getloadavg()[0]
    speed, memory = zip(*(compare(name, args) for name in args.models), strict=True)
    page = "\n".join(
        [
            "# Speed next to PyTorch\n",
            f"`python -m benchmarks.speed {' '.join(sys.argv[1:])}`, on {datetime.date.today()}, on "
            f"{hardware()}, {jax.device_count()} JAX devices (load average {load:.1f} at the start),",
            f"with {versions()}.\n",
            NOTES.read_text(),
            "## Speed\n",
            table(
                (
                    *("network", "batch", "training, images/s", "PyTorch", "ratio", "of the peak"),
                    *("prediction, images/s", "PyTorch", "ratio", "of the peak", "evaluation"),
                ),
                speed,
            ),
            "## Memory, compilation and rates of training\n",
            table(
                (
                    *("network", "peak, MB", "with remat", "PyTorch", "compiling, s"),
                    *("GFLOP/s", "of matmul", "GB/s", "of copy"),
                ),
                memory,
            ),
            "## Losses and confusion matrix\n",
            table(
                ("network", "step", "cross_entropy", "soft_dice", "dice_ce", "confusion_matrix"),
                overheads(args),
            ),
            "## Growth\n",
            table(
                ("batch", "ms per step", "ns per pixel", "FLOP per pixel", "bytes per pixel"),
                growth(args),
            ),
        ]
    )
    PAGE.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
