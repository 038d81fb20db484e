"""Several processes train as one run: real ones on this machine, which talk through gloo."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from dense_jax import train, workdir
from tests.conftest import REPOSITORY
from tests.test_train import make_config

HEARTBEAT = 10  # seconds without a sign of life after which a process counts as dead
PROCESS = f"""
import json
import sys
import time
import jax
from ml_collections import ConfigDict

config, path, port, num_processes, process, pause = json.loads(sys.argv[1])
if num_processes > 1:
    jax.distributed.initialize(
        f"localhost:{{port}}", num_processes, process, heartbeat_timeout_seconds={HEARTBEAT}
    )
from dense_jax import train
requested = train.Interrupts.requested
train.Interrupts.requested = lambda self, step: time.sleep(pause) or requested(self, step)
train.train(ConfigDict(config), path)
"""


def start(config, path, num_processes, num_devices, pause=0.0):
    """Starts a run in processes of so many devices each, which pause, in seconds, at each step."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(num_devices)}
    processes = []
    for k in range(num_processes):
        arguments = json.dumps([config.to_dict(), str(path), port, num_processes, k, pause])
        with path.with_name(f"{path.name}.{k}.log").open("w") as log:
            command = [sys.executable, "-c", PROCESS, arguments]
            processes.append(
                subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log)
            )
    return processes


def wait(processes, path):
    """Exit statuses, once all have ended; fails with what they said where they do not end."""
    try:
        return [process.wait(timeout=200) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        pytest.fail("\n".join(log.read_text() for log in path.parent.glob(f"{path.name}.*.log")))


def run(config, path, num_processes, num_devices):
    """Trains to the end."""
    statuses = wait(start(config, path, num_processes, num_devices), path)
    logs = [log.read_text() for log in sorted(path.parent.glob(f"{path.name}.*.log"))]
    assert not any(statuses), "\n".join(logs)


def records(path):
    return workdir.read_records(path / "metrics.jsonl")


def wait_for_steps(processes, path, num_steps):
    while len(records(path)) < num_steps:
        assert all(process.poll() is None for process in processes), path
        time.sleep(0.05)


def assert_close(path, expected):
    """The same steps, and the same losses and scores to float tolerance."""
    for ours, theirs in zip(records(path), records(expected), strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for name, value in theirs.items():
            if name.startswith("train/"):
                np.testing.assert_allclose(ours[name], value, rtol=1e-3, err_msg=name)


@pytest.fixture(scope="module")
def config(tiny_folder):
    config = make_config(tiny_folder)
    config.model.dropout = 0.0  # its masks belong to places in the batch, which hosts share out
    config.num_steps = 4
    return config


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, config):
    """Trained in one process with four devices."""
    path = tmp_path_factory.mktemp("one") / "run"
    run(config, path, 1, 4)
    return path


def test_two_processes_are_the_same_run_as_one(tmp_path, config, one_process):
    run(config, tmp_path / "run", 2, 2)
    assert_close(tmp_path / "run", one_process)


@pytest.mark.parametrize(("num_processes", "num_devices", "num_seeds"), [(4, 1, 2)])
def test_seeds_share_the_processes(tmp_path, config, num_processes, num_devices, num_seeds):
    """Each seed over two of the processes."""
    config = config.copy_and_resolve_references()
    config.num_seeds = num_seeds
    run(config, tmp_path / "one", 1, 4)
    run(config, tmp_path / "run", num_processes, num_devices)
    for seed in range(num_seeds):
        assert_close(tmp_path / "run" / f"seed={seed}", tmp_path / "one" / f"seed={seed}")


def test_one_checkpoint_has_one_confusion_matrix(tmp_path, config, one_process):
    """Evaluated again by other processes, which find it finished but for its result."""
    again = tmp_path / "again"
    shutil.copytree(one_process, again)
    (again / "result.json").unlink()
    run(config, again, 2, 2)
    final, expected = (workdir.read(path, "result.json")["final"] for path in (again, one_process))
    assert final == expected


def test_all_save_the_same_step_when_one_is_preempted(tmp_path, config):
    config = config.copy_and_resolve_references()
    config.num_steps, config.eval_every, config.checkpoint_every = 60, 60, 60
    path, expected = tmp_path / "run", tmp_path / "expected"
    # JAX takes a moment to tell all of them: on a fast machine the run would be over by then.
    processes = start(config, path, 2, 1, pause=0.2)
    wait_for_steps(processes, path, 5)
    processes[1].send_signal(signal.SIGTERM)
    assert wait(processes, path) == [train.PREEMPTED] * 2
    stopped = records(path)[-1]["step"]
    saved = [step.name for step in (path / "checkpoints" / "latest").iterdir()]
    assert saved == [str(stopped)] and 5 <= stopped < config.num_steps
    run(config, path, 1, 2)  # on another number of processes
    run(config, expected, 1, 2)
    assert [record["step"] for record in records(path)] == [*range(1, 61), 60]
    assert_close(path, expected)


@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_stop_when_one_is_killed(tmp_path, config, killed):
    config = config.copy_and_resolve_references()
    config.num_steps = config.eval_every = 10**6
    path = tmp_path / "run"
    processes = start(config, path, 2, 1)
    wait_for_steps(processes, path, 5)
    processes[killed].kill()
    start_of_wait = time.monotonic()
    statuses = wait(processes, path)
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] not in (0, train.PREEMPTED)
    assert time.monotonic() - start_of_wait < 3 * HEARTBEAT
    assert (path / "checkpoints" / "latest").exists()
