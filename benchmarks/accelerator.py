"""Measures one accelerator in calls of limited time: python -m benchmarks.accelerator --minutes=9

Each call does what is left, until its minutes are over: first the speeds of `speed`, next to
PyTorch where it is installed, then transposed convolutions, then the runs of SegNet's table at full
size on CamVid (--data). The folder --output is small. It holds all results, and a copy of it is
enough to go on at another machine. --workdir holds the checkpoints of the unfinished run. Remove a
part's JSON file to measure it again.

On a CPU, everything is tiny, and the numbers mean nothing.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

NETWORKS = "unet64", "unet32", "unet_resnet34", "fcn8s_vgg16", "segnet_basic", "unet16"
SHAPES = (16, 64, 256, 2), (16, 128, 64, 2), (16, 128, 64, 4), (16, 32, 64, 8)
TABLE = "segnet_table"
REPOSITORY = pathlib.Path(__file__).parents[1]


def machine(tiny: bool) -> dict[str, Any]:
    """Returns what the device and the software are, and the speeds of a product and a copy."""
    import jax

    from benchmarks import pipeline, speed

    speeds = speed.machine()
    flops, moved = speeds.rates(speed.typical(speed.measure(speeds.calls, rounds(tiny))))
    return {
        "platform": jax.default_backend(),
        "hardware": pipeline.hardware(),
        "versions": pipeline.versions(),
        "rates": f"{flops / 1e12:.3g} TFLOP/s in a matrix product, {moved / 1e9:.3g} GB/s in a copy",
    }


def network(name: str, tiny: bool) -> dict[str, list[str]]:
    """Returns the network's rows in the tables of `speed`."""
    from benchmarks import speed

    if tiny:
        make, *_ = speed.MODELS[name]
        speed.MODELS[name] = make, 2, 32
    return speed.compare(name, rounds(tiny))


def transposed(tiny: bool) -> dict[str, list[list[str]]]:
    """Returns the times of transposed convolutions with their gradients: ours, Flax's, PyTorch's."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from benchmarks import speed
    from dense_jax.models.upsampling import UPSAMPLERS

    def step(module: nn.Module, x: jax.Array) -> Callable[[], Any]:
        parameters = module.init(jax.random.key(0), x)

        def loss(parameters, x):
            return jnp.sum(module.apply(parameters, x).astype(jnp.float32) ** 2)

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return lambda: jax.block_until_ready(gradient(parameters, x))

    lines = []
    for batch, size, channels, kernel in [(1, 8, 4, 2)] if tiny else SHAPES:
        x = jnp.ones((batch, size, size, channels), jnp.float32 if tiny else jnp.bfloat16)
        ours = UPSAMPLERS["transposed_conv"](features=channels, kernel_size=kernel, dtype=x.dtype)
        flax = nn.ConvTranspose(channels, (kernel, kernel), strides=(2, 2), dtype=x.dtype)
        calls = {"ours": step(ours, x), "Flax": step(flax, x)}
        with contextlib.suppress(ImportError):
            calls["PyTorch"] = torch_step(batch, size, channels, kernel, tiny)
        seconds = speed.typical(speed.measure(calls, rounds(tiny)))
        times = [f"{1000 * seconds[c]:.3f}" if c in seconds else "" for c in TRANSPOSED[2:]]
        lines.append([f"{batch} x {size}² x {channels}", f"{kernel}²", *times])
    return {"rows": lines}


TRANSPOSED = "input", "kernel", "ours", "Flax", "PyTorch"


def torch_step(batch: int, size: int, channels: int, kernel: int, tiny: bool) -> Callable[[], Any]:
    """Returns PyTorch's transposed convolution with its gradient, channels last and compiled."""
    import torch

    device, dtype = ("cpu", torch.float32) if tiny else ("cuda", torch.bfloat16)
    padding = (kernel - 2) // 2
    layer: Any = torch.nn.ConvTranspose2d(channels, channels, kernel, 2, padding)
    layer = layer.to(device, dtype, memory_format=torch.channels_last)
    x = torch.ones((batch, channels, size, size), dtype=dtype, device=device, requires_grad=True)
    x.data = x.data.to(memory_format=torch.channels_last)
    compiled = layer if tiny else torch.compile(layer)

    def call() -> None:
        (compiled(x).float() ** 2).sum().backward()
        x.grad = None
        if not tiny:
            torch.cuda.synchronize()

    return call


def rounds(tiny: bool) -> argparse.Namespace:
    return argparse.Namespace(rounds=1, calls=1) if tiny else argparse.Namespace(rounds=5, calls=5)


PARTS = ("machine", NETWORKS[0], "transposed", *NETWORKS[1:])


def measure(part: str, output: pathlib.Path) -> None:
    """Measures a part and writes its JSON file, with the error if there is one."""
    import jax

    tiny = jax.default_backend() == "cpu"
    functions = {"machine": machine, "transposed": transposed}
    try:
        found = functions[part](tiny) if part in functions else network(part, tiny)
    except Exception as error:  # noqa: BLE001  # the other parts are still worth their time
        found = {"error": f"{type(error).__name__}: {error}"[:500]}
    write(output / f"{part}.json", {"date": str(datetime.date.today()), **found})


def write(path: pathlib.Path, content: dict[str, Any]) -> None:
    from dense_jax import storage

    storage.write_json(path, content)


def run(command: Sequence[str], deadline: float) -> int | None:
    """Runs `python -m` with these arguments. Returns its status, or None if the time was over.

    A command that is still running at the deadline is asked to save, and killed 30 s later.
    """
    if (seconds := deadline - time.monotonic()) <= 0:
        return None
    # PyTorch needs a part of the GPU's memory.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    child = subprocess.Popen([sys.executable, "-m", *command], cwd=REPOSITORY, env=environment)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(seconds)
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(30)
    child.kill()
    return None


def table_command(args: argparse.Namespace, tiny: bool) -> list[str]:
    """Returns the sweep of SegNet's table."""
    data, size = args.data, ":full"
    changes = []
    if tiny:
        data, size = args.workdir / "data", ""
        write_data(data)
        changes = ["num_steps=2", "eval_every=2", "checkpoint_every=2", "model.widths=(4,4,4,4)"]
        changes += ["data.crop_size=(32,32)", "data.resolution=1.0"]
    return [
        *("dense_jax.sweep", f"--config=experiments/camvid_segnet_table.py{size}"),
        *(f"--workdir={args.workdir / TABLE}", f"--kept={args.output / TABLE}"),
        *("--evaluate=test", f"--config.data.root={data}"),
        *(f"--config.{change}" for change in changes),
    ]


def write_data(root: pathlib.Path) -> None:
    """Writes a tiny dataset of 11 classes, as many as CamVid has."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 4), ("val", 2), ("test", 2)):
        for i in range(number):
            label = np.indices((48, 64))[i % 2] * 11 // (48, 64)[i % 2]
            image = 20 * label + rng.integers(0, 30, label.shape)
            for kind, pixels in (("images", image), ("labels", label)):
                path = root / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    write(root / "dataset.json", {"classes": [f"class {i}" for i in range(11)]})


def page(output: pathlib.Path) -> str:
    """Returns the contents of README.md in the output folder."""
    from benchmarks.conformance import table
    from benchmarks.speed import TABLES

    found = {part: read(output / f"{part}.json") for part in PARTS}
    about, lines = found["machine"], found["transposed"].get("rows", ())
    command = f"`python -m benchmarks.accelerator`, {about.get('date')}"
    device = f"{about.get('hardware')}: {about.get('rates')}. {about.get('versions')}"
    meaning = "benchmarks/speed.md says what the columns mean"
    parts = ["# An accelerator, measured", f"{command}, on {device}. {meaning}."]
    for title, columns in TABLES.items():
        rows = [found[name][title] for name in NETWORKS if title in found[name]]
        parts += [f"## {title}", table(columns, rows)]
    parts += ["## Transposed convolutions", "With stride 2, and gradients; ms per call."]
    parts += [table(TRANSPOSED, lines)]
    if (report := output / f"{TABLE}.md").exists():
        parts += ["## SegNet's table", report.read_text()]
    parts += [f"{part}: {about['error']}" for part, about in found.items() if "error" in about]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="time of this call")
    parser.add_argument("--output", type=pathlib.Path, default="runs/accelerator/results")
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/accelerator")
    parser.add_argument("--data", type=pathlib.Path, help="CamVid, in the folder layout")
    parser.add_argument("--part", choices=PARTS, help="measure this part alone")
    args = parser.parse_args()
    args.output, args.workdir = args.output.absolute(), args.workdir.absolute()
    if args.data:
        args.data = args.data.absolute()
    if args.part:
        measure(args.part, args.output)
        return 0
    deadline = time.monotonic() + 60 * args.minutes
    left = [part for part in PARTS if not (args.output / f"{part}.json").exists()]
    while left and time.monotonic() < deadline:
        part = left[0]
        command = ["benchmarks.accelerator", f"--part={part}", f"--output={args.output}"]
        status = run(command, deadline)
        if status is None:
            break
        if status:  # the process was killed, for example for its memory
            write(args.output / f"{part}.json", {"error": f"ended with status {status}"})
        left.pop(0)
    is_done = not left
    tiny = read(args.output / "machine.json").get("platform") == "cpu"
    if is_done and not (args.data or tiny):
        print("pass --data=CAMVID to train the rows of SegNet's table", file=sys.stderr)
    elif is_done:
        is_done = run(table_command(args, tiny), deadline) == 0
        if list((args.output / TABLE).glob("*/result.json")):
            report = ["dense_jax.report", f"--workdir={args.workdir / TABLE}", "--split=test"]
            if run([*report, "--gallery=0"], time.monotonic() + 60) == 0:
                shutil.copy(args.workdir / TABLE / "report.md", args.output / f"{TABLE}.md")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "README.md").write_text(page(args.output))
    print(f"wrote {args.output}: {'all is done' if is_done else 'the same command goes on'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
