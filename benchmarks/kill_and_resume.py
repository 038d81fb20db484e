"""Checks that killing and resuming a training run leaves the results bitwise unchanged.

python -m benchmarks.kill_and_resume --cycles=20 --processes=1

Trains a small run without interruption, as a reference. Each cycle then starts the same run in a
new workdir, sends SIGKILL or SIGTERM at a random moment (even during imports, compilation or
saving), and resumes the run. The cycle compares parameters, statistics, optimizer state,
metrics.jsonl and result.json to the reference. If a run has several processes, a random process
gets the signal. If the process dies from it, all processes are killed, as launchers do. Prints a
line per cycle. The exit status is 1 if anything differs.

With --bucket, the workdirs are in a bucket, which tests/bucket_server.py serves.
"""

import argparse
import contextlib
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dense_jax import buckets
from dense_jax.command import PREEMPTED

NUM_STEPS = 40
OVERRIDES = {
    "num_steps": NUM_STEPS,
    "batch_size": 4,
    "eval_every": 25,
    "checkpoint_every": 5,
    "log_every": 1,
    "model.widths": "(4, 8)",
    "model.convs_per_level": 1,
    "data.crop_size": "(16, 16)",
}


def start(
    workdir: epath.Path, logs: pathlib.Path, num_processes: int, workers: int
) -> list[subprocess.Popen]:
    """Starts or resumes the run in `workdir`. Returns its processes, which log to files in `logs`."""
    command = [
        *(sys.executable, "-m", "dense_jax.main", "--config=experiments/unet_dice.py"),
        f"--workdir={workdir}",
        f"--config.data.workers={workers}",
        *(f"--config.{field}={value}" for field, value in OVERRIDES.items()),
    ]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"--coordinator=localhost:{free.getsockname()[1]}"
    processes = []
    for k in range(num_processes):
        place = [coordinator, f"--num_processes={num_processes}", f"--process_id={k}"]
        with (logs / f"{workdir.name}.{k}.log").open("a") as log:
            processes.append(
                subprocess.Popen(
                    [*command, *place] if num_processes > 1 else command,
                    env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
                    stdout=log,
                    stderr=log,
                )
            )
    return processes


def steps_done(workdir: epath.Path) -> int:
    """Returns the number of lines in metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def finish(processes: list[subprocess.Popen], workdir: epath.Path, logs: pathlib.Path) -> None:
    """Waits until all processes of a run end. If the run fails, prints its logs and exits."""
    if any(process.wait() for process in processes):
        paths = sorted(logs.glob(f"{workdir.name}.*.log"))
        sys.exit("\n".join(log.read_text()[-5000:] for log in paths))


def same(one: epath.Path, other: epath.Path) -> bool:
    """Returns whether two finished runs have bitwise equal checkpoints and results."""
    states = []
    for path in (one, other):
        saved = path / "checkpoints" / "latest" / str(NUM_STEPS) / "default"
        with ocp.PyTreeCheckpointer() as checkpointer:
            # Restores NumPy arrays, because the devices that held the saved arrays are gone.
            metadata = checkpointer.metadata(saved).item_metadata.tree
            to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            states.append(jax.tree.leaves(checkpointer.restore(saved, restore_args=to_numpy)))
    return all(np.array_equal(a, b) for a, b in zip(*states, strict=True)) and all(
        (one / name).read_bytes() == (other / name).read_bytes()
        for name in ("metrics.jsonl", "result.json")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="data.workers")
    parser.add_argument("--seed", type=int, default=0, help="for the random moments and signals")
    parser.add_argument("--bucket", action="store_true", help="workdirs in a bucket, SIGKILL only")
    args = parser.parse_args()
    absl.logging.set_verbosity(absl.logging.ERROR)  # hides warnings from Orbax
    draw = random.Random(args.seed)
    failed = False
    with contextlib.ExitStack() as stack:
        logs = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        parent, signals = epath.Path(logs), [signal.SIGKILL, signal.SIGTERM]
        if args.bucket:
            from tests.bucket_server import BucketServer

            os.environ |= stack.enter_context(BucketServer()).environment
            parent, signals = epath.Path("gs://bucket/runs"), [signal.SIGKILL]
            buckets.check(str(parent), "output")
        expected, options = parent / "expected", (logs, args.processes, args.workers)
        begin = time.monotonic()
        finish(start(expected, *options), expected, logs)
        length = time.monotonic() - begin
        for cycle in range(args.cycles):
            workdir = parent / f"run{cycle}"
            processes = start(workdir, *options)
            number = draw.choice(signals)
            moment = draw.uniform(0, length)
            time.sleep(moment)
            hit = draw.choice(processes)
            hit.send_signal(number)
            if hit.wait() not in (0, PREEMPTED):
                for process in processes:
                    process.kill()
            statuses = {process.wait() for process in processes}
            records = steps_done(workdir)
            finish(start(workdir, *options), workdir, logs)
            equal = same(workdir, expected)
            failed |= not equal or not statuses <= {0, PREEMPTED, -number, -signal.SIGKILL}
            print(
                f"{number.name} after {moment:.1f} of {length:.1f} s and {records} records (exit "
                f"status {', '.join(map(str, statuses))}): "
                f"{'bitwise the same' if equal else 'DIFFERENT'}",
                flush=True,
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
