"""Estimates training steps on TPU slices, and writes the table of docs/scaling.md. Needs no TPU.

pip install "jax[tpu]"
python -m benchmarks.scaling

Compiles each network with the TPU's compiler for 8 chips of each kind, for minutes, and keeps the
numbers in benchmarks/results/scaling.json. The command resumes there; delete the file to compile
anew. A larger slice runs the same program on each chip, and only its collectives take longer.
"""

import itertools
import json
import math
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from dense_jax import command, storage, summary
from dense_jax.devices import cost, tpu_compiler
from dense_jax.evaluation.tables import markdown_table

REPOSITORY = pathlib.Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "scaling.json"
PAGE = REPOSITORY / "docs" / "scaling.md"
IMAGES = 8  # on each chip
NETWORKS = {"camvid_unet": "camvid_unet:full", "unet_resnet34": "unet_resnet34"}
SLICES = {"v5e-8": (2, 4), "v5e-16": (4, 4), "v5e-256": (16, 16), "v6e-8": (2, 4)}  # chips
LINKS = {"v5e": 50e9, "v6e": 100e9}  # bytes/s of one link in one direction
HOP = 1e-6  # seconds from a chip to its neighbor


def compile_step(experiment: str, kind: str) -> dict[str, Any]:
    """Compiles a training step for 8 chips such as "v5e". Returns its numbers for each chip."""
    devices, chip = tpu_compiler.describe(f"{kind}-8")
    config = command.load_config(experiment)
    config.batch_size = IMAGES * len(devices)
    config.model.dtype = "bfloat16"
    start = time.monotonic()
    step = next(summary.tpu_steps(config, num_classes=11, num_channels=3, devices=devices))
    return {
        "flops": step.flops // len(devices),
        "cycles": sum(i.cycles for i in tpu_compiler.instructions(step.compiled)),
        "peak_bytes": cost.memory(step.compiled)["peak"],
        "collectives": tpu_compiler.collectives(step.compiled),
        "chip": chip._asdict(),
        "seconds_to_compile": round(time.monotonic() - start),
    }


def row(network: str, name: str, numbers: Mapping[str, Any]) -> dict[str, str]:
    """Returns {column: text} for the slice `name`; docs/scaling.md explains the columns."""
    chip, shape = tpu_compiler.Chip(**numbers["chip"]), SLICES[name]
    n = math.prod(shape)
    compute = numbers["cycles"] / chip.clock
    number, size = map(sum, zip(*numbers["collectives"].values(), strict=True))
    hops = 2 * sum(length - 1 for length in shape)
    waiting = 2 * (n - 1) / n * size / LINKS[_kind(name)] + number * hops * HOP
    # The smallest batch at which the computation, proportional to it, is 9 times as long.
    enough = math.ceil(9 * waiting / (compute / IMAGES))
    return {
        "network": network,
        "slice": name,
        "memory": f"{numbers['peak_bytes'] / 1e9:.1f} GB",
        "computation": f"{1e3 * compute:.1f} ms",
        "of the peak": f"{100 * numbers['flops'] / compute / chip.peak:.0f} %",
        "collectives": f"{number}, {size / 1e6:.1f} MB",
        "their time": f"{1e3 * waiting:.2f} ms",
        "images per second": f"{n * IMAGES / (compute + waiting):,.0f}",
        "efficiency": f"{100 * compute / (compute + waiting):.0f} %",
        "90 % from": str(enough),
    }


def _kind(name: str) -> str:
    return name.partition("-")[0]


def page(text: str, results: Mapping[str, Any]) -> str:
    """Returns the text of docs/scaling.md with a new table, between its two HTML comments."""
    rows = [
        row(network, name, results["steps"][step])
        for network in NETWORKS
        for name in SLICES
        if (step := f"{network} on {_kind(name)}") in results["steps"]
    ]
    table = markdown_table([list(rows[0]), *(list(r.values()) for r in rows)], 2)
    pattern = r"(?<=<!-- table -->\n\n).*?(?=\n\n<!-- end -->)"
    return re.sub(pattern, lambda _: table, text, flags=re.DOTALL)


def main() -> None:
    """Compiles what is missing. Writes the results and the table after each step."""
    import libtpu

    versions = {"jax": jax.__version__, "libtpu": libtpu.__version__}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if results.get("versions") != versions:
        results = {"versions": versions, "steps": {}}
    for kind, (network, experiment) in itertools.product(LINKS, NETWORKS.items()):
        name = f"{network} on {kind}"
        if name not in results["steps"]:
            results["steps"][name] = compile_step(experiment, kind)
            storage.write_json(RESULTS, results)
            PAGE.write_text(page(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
