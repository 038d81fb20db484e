"""Measures the input pipeline: python -m benchmarks.pipeline --root=CAMVID

Times decoding, augmentation, batches (with worker processes or caches) and the training step for
`experiments/camvid_unet.py:reduced`. If torch and albumentations are installed, also times an
equivalent pipeline built with these libraries. The pipelines take turns, so that other load on the
machine affects all of them. Writes benchmarks/pipeline.md.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from importlib import metadata
from typing import Any

import jax
from absl import flags

from benchmarks.conformance import table
from dense_jax import data
from dense_jax.data import pipeline
from dense_jax.data.cache import Cached
from dense_jax.devices import mesh
from dense_jax.labels import IGNORE_LABEL
from dense_jax.program import assemble
from dense_jax.training import device_cache, task
from dense_jax.training.augment import augment_batch
from experiments import camvid_unet

try:
    import albumentations
    import cv2
    import torch
except ImportError as error:
    MISSING = f"{error.name} is not installed: pip install torch albumentations"
else:
    MISSING = ""
    cv2.setNumThreads(0)  # at import, so that it also applies in worker processes
    torch.set_num_threads(1)

PAGE = pathlib.Path(__file__).with_suffix(".md")
PACKAGES = ("jax", "grain", "numpy", "pillow", "torch", "albumentations", "opencv-python-headless")
WORKERS = (0, 1, 2)
READ_AHEAD = 12  # the number of batches, more than any stream prefetches
PAGE_TEXT = """# The input pipeline

`{command}`, on {date}, on {hardware} (load average {load:.1f} at the start), with
{versions}.

Examples per second, in batches of {config.batch_size} CamVid images of {height} x {width} pixels, augmented
to {config.data.crop_size}: the median of {args.rounds} rounds of {args.steps} batches, and their range. A
host batch is decoded and on its canvas, which is what this package's host does for a batch; an
augmented one is what the network gets. The rows of torch decode by OpenCV and augment by
albumentations, on the host, without or with worker processes.

{rates}
Milliseconds per training step, from the call to its result: the median of {args.pairs}, and their
range. Fed by the device cache a step takes {overhead:+.1f} % (median of pairs).

{steps}"""

# Row name -> function that opens a pipeline and returns a function that makes one batch per call.
# Closing the stack closes the pipeline.
Rows = dict[str, Callable[[contextlib.ExitStack], Callable[[], Any]]]


class Files:
    """The image and label files of the dataset as a torch dataset."""

    def __init__(self, root: str, transform: Callable[..., Any]):
        images, labels = (
            sorted(pathlib.Path(root, kind, "train").iterdir()) for kind in ("images", "labels")
        )
        self._paths = [(str(a), str(b)) for a, b in zip(images, labels, strict=True)]
        self._transform = transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> Any:
        image, label = self._paths[i]
        return self._transform(
            image=cv2.cvtColor(cv2.imread(image), cv2.COLOR_BGR2RGB),
            mask=cv2.imread(label, cv2.IMREAD_UNCHANGED),
        )


def peers(config: Any) -> Rows:
    """Returns the table rows of OpenCV, albumentations and torch, as functions to time."""
    height, width = config.data.crop_size
    zooms = (config.data.resolution * (1 + config.augment.scale) ** sign for sign in (-1, 1))
    transform = albumentations.Compose(
        [
            albumentations.RandomScale([zoom - 1 for zoom in zooms], p=1),
            albumentations.PadIfNeeded(
                height, width, border_mode=cv2.BORDER_REFLECT_101, fill_mask=IGNORE_LABEL
            ),
            albumentations.RandomCrop(height, width),
            albumentations.HorizontalFlip(p=config.augment.flip),
            albumentations.ToTensorV2(),
        ]
    )
    decoded, augmented = Files(config.data.root, dict), Files(config.data.root, transform)
    numbers = itertools.cycle(range(len(decoded)))
    examples = itertools.cycle([decoded[i] for i in range(64)])

    def stream(files: Files, workers: int, _: Any) -> Callable[[], Any]:
        loader = torch.utils.data.DataLoader(
            files,
            config.batch_size,
            sampler=torch.utils.data.RandomSampler(files, replacement=True, num_samples=10**6),
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
        )
        return iter(loader).__next__

    rows: Rows = {
        "decode, 1 thread, OpenCV": lambda _: (
            lambda: [decoded[i] for i in itertools.islice(numbers, config.batch_size)]
        ),
        "augment, 1 thread, albumentations": lambda _: (
            lambda: [transform(**each) for each in itertools.islice(examples, config.batch_size)]
        ),
    }
    for n in WORKERS:
        rows[f"host batches, workers {n}, torch"] = functools.partial(stream, decoded, n)
        rows[f"augmented batches, workers {n}, torch"] = functools.partial(stream, augmented, n)
    return rows


class Ours:
    """This package's pipeline and training step, ready to be timed."""

    def __init__(self, config: Any):
        self.config = config
        self.source = data.open_dataset("folder", config.data.root, "train")
        self.canvas = tuple(self.source.sizes.max(axis=0).tolist())
        self.devices = mesh.make_mesh()
        shapes = task.batch_shapes(config, self.canvas, self.source.num_channels)
        self.resident, self.numbers = device_cache.load(self.source, shapes, self.devices)

    def stream(self, stack: contextlib.ExitStack, examples: Any, workers: int = 0) -> Any:
        batches = pipeline.train_batches(
            examples,
            canvas=None if examples is self.numbers else self.canvas,
            seed=0,
            batch_size=self.config.batch_size,
            workers=workers,
        )
        return stack.enter_context(contextlib.closing(batches))

    def rows(self) -> Rows:
        source, config = self.source, self.config
        augment = functools.partial(
            augment_batch,
            num_classes=source.num_classes,
            crop_size=config.data.crop_size,
            resolution=config.data.resolution,
            **config.augment.to_dict(),
        )

        @jax.jit
        def augmented(batch, resident):
            batch = device_cache.gather(resident, batch)
            keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(0), n))(batch["index"])
            return augment(keys, batch)

        numbers = itertools.cycle(range(len(source)))
        cached = Cached(source)
        streams = {f"workers {n}": (source, n) for n in WORKERS}
        streams |= {"host cache": (cached, 0), "device cache": (self.numbers, 0)}

        def decode(apply: Callable) -> Callable[[], list[Any]]:
            return lambda: list(
                apply(source.__getitem__, itertools.islice(numbers, config.batch_size))
            )

        def decode_in_threads(stack: contextlib.ExitStack) -> Callable[[], list[Any]]:
            return decode(stack.enter_context(futures.ThreadPoolExecutor(os.cpu_count())).map)

        def augment_one(stack: contextlib.ExitStack) -> Callable[[], Any]:
            batch = mesh.to_global(next(self.stream(stack, cached)), self.devices)
            return lambda: augmented(batch, {})

        def host(name: str, stack: contextlib.ExitStack) -> Callable[[], Any]:
            return self.stream(stack, *streams[name]).__next__

        def host_and_device(name: str, stack: contextlib.ExitStack) -> Callable[[], Any]:
            batches = self.stream(stack, *streams[name])
            resident = self.resident if name == "device cache" else {}
            return lambda: augmented(mesh.to_global(next(batches), self.devices), resident)

        rows: Rows = {
            "decode, 1 thread": lambda _: decode(map),
            f"decode, {os.cpu_count()} threads": decode_in_threads,
            "augment, jitted": augment_one,
        }
        for name in streams:
            rows[f"host batches, {name}"] = functools.partial(host, name)
            rows[f"augmented batches, {name}"] = functools.partial(host_and_device, name)
        return rows

    def step_seconds(self, num_pairs: int) -> tuple[list[float], list[float]]:
        """Returns the seconds of training steps with a constant batch and with the device cache."""
        program = assemble(self.config, self.source.num_classes)
        training = task.bind(self.config, program, self.source.num_channels)

        @functools.partial(jax.jit, donate_argnums=0)
        def train_step(state, batch, resident):
            return training.train_step(state, batch, key, resident)

        key = jax.random.key(self.config.seed)
        state = jax.jit(training.init_state, out_shardings=mesh.replicated(self.devices))(key)
        seconds: tuple[list[float], list[float]] = [], []
        with contextlib.ExitStack() as stack:
            batches = self.stream(stack, self.numbers)
            rows = mesh.to_global(next(batches), self.devices)
            constant = jax.jit(device_cache.gather)(self.resident, rows)
            for _ in range(1 + num_pairs):
                for times, from_cache in zip(seconds, (False, True), strict=True):
                    start = time.perf_counter()
                    if from_cache:
                        batch = mesh.to_global(next(batches), self.devices)
                        state, values = train_step(state, batch, self.resident)
                    else:
                        state, values = train_step(state, constant, {})
                    jax.block_until_ready((state, values))
                    times.append(time.perf_counter() - start)
        return seconds[0][1:], seconds[1][1:]  # the first ones include compilation


def measure(rows: Rows, *, rounds: int, steps: int) -> Mapping[str, list[float]]:
    """Times each row once per round. Returns {row name: seconds per batch in each round}."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, opens in rows.items():
            with contextlib.ExitStack() as stack:
                make = opens(stack)
                for _ in range(READ_AHEAD):
                    batch = make()
                jax.block_until_ready(batch)
                start = time.perf_counter()
                for _ in range(steps):
                    batch = make()
                jax.block_until_ready(batch)
                seconds[name].append((time.perf_counter() - start) / steps)
                del make  # ends the worker processes of a torch loader
    return seconds


def summary(values: Sequence[float]) -> tuple[str, str]:
    """Returns the median and the range of the values as texts."""
    return f"{statistics.median(values):.0f}", f"{min(values):.0f} to {max(values):.0f}"


def hardware() -> str:
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores of {cpu}, jax on {jax.devices()[0].device_kind}"


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="CamVid, in the folder layout")
    parser.add_argument("--steps", type=int, default=30, help="batches per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=12, help="training steps of each kind")
    args = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # worker processes receive the absl flags
    load = os.getloadavg()[0]
    config = camvid_unet.get_config("reduced")
    config.data.root = args.root
    ours = Ours(config)
    rows = ours.rows()
    if MISSING:
        print(MISSING)
    else:
        rows |= peers(config)
    seconds = measure(rows, rounds=args.rounds, steps=args.steps)
    constant, cached = ours.step_seconds(args.pairs)
    height, width = ours.canvas
    options = " ".join(sys.argv[1:]).replace(args.root, "CAMVID")
    page = PAGE_TEXT.format(
        command=f"python -m benchmarks.pipeline {options}",
        date=datetime.date.today(),
        hardware=hardware(),
        load=load,
        versions=versions(),
        config=config,
        args=args,
        height=height,
        width=width,
        overhead=100 * statistics.median(b / a - 1 for a, b in zip(constant, cached, strict=True)),
        rates=table(
            ("", "examples per second", "range"),
            (
                (name, *summary([config.batch_size / t for t in times]))
                for name, times in sorted(seconds.items())
            ),
        ),
        steps=table(
            ("", "ms per step", "range"),
            (
                (name, *summary([1000 * t for t in times]))
                for name, times in (("constant batch", constant), ("device cache", cached))
            ),
        ),
    )
    PAGE.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
