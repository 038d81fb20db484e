"""Kills training at random moments and starts it again: does it end bitwise the same?

python benchmarks/kill_and_resume.py --kills=3 --workers=0

Trains the same small run without and with interruptions, as the real command in processes of its
own, and compares parameters, statistics, optimizer state, metrics.jsonl and result.json. Prints a
row per kill; exit status 1 if anything differs.
"""

import argparse
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

NUM_STEPS = 40


def start(workdir: pathlib.Path, workers: int) -> subprocess.Popen:
    """Starts or resumes the run."""
    overrides = {
        "num_steps": NUM_STEPS,
        "eval_every": 15,
        "checkpoint_every": 5,
        "log_every": 1,
        "model.widths": "(4, 8)",
        "data.crop_size": "(32, 32)",
        "data.workers": workers,
    }
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "dense_jax.main", "--config=experiments/unet_dice.py"),
            f"--workdir={workdir}",
            *(f"--config.{field}={value}" for field, value in overrides.items()),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_done(workdir: pathlib.Path) -> int:
    """Lines of metrics.jsonl: a clock that ticks with the run."""
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def same(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two finished runs are bitwise equal."""
    states = [
        jax.tree.leaves(
            ocp.StandardCheckpointer().restore(
                path / "checkpoints" / "latest" / str(NUM_STEPS) / "default"
            )
        )
        for path in (one, other)
    ]
    return all(np.array_equal(a, b) for a, b in zip(*states, strict=True)) and all(
        (one / name).read_bytes() == (other / name).read_bytes()
        for name in ("metrics.jsonl", "result.json")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="data.workers")
    parser.add_argument("--signal", choices=("SIGKILL", "SIGTERM"), default="SIGKILL")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        expected = pathlib.Path(folder, "expected")
        process = start(expected, args.workers)
        _, errors = process.communicate()
        if process.returncode:
            sys.exit(errors)
        for kill in range(args.kills):
            workdir = pathlib.Path(folder, f"run{kill}")
            process = start(workdir, args.workers)
            after = moments.randrange(NUM_STEPS)
            while steps_done(workdir) < after and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.3))
            process.send_signal(getattr(signal, args.signal))
            _, errors = process.communicate()
            stopped = process.returncode
            process = start(workdir, args.workers)
            _, errors = process.communicate()
            if process.returncode:
                sys.exit(errors)
            equal = same(workdir, expected)
            failed |= not equal or stopped == 0
            print(
                f"{args.signal} after {after} records (exit status {stopped}), "
                f"workers {args.workers}: {'bitwise the same' if equal else 'DIFFERENT'}",
                flush=True,
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
