"""Tests that real processes on this machine, connected by Gloo, train as one run."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from dense_jax import train
from dense_jax.command import PREEMPTED
from dense_jax.devices import distributed
from dense_jax.training import ensemble, task
from dense_jax.workdir import files
from tests import forked
from tests.conftest import REPOSITORY
from tests.test_train import make_config

HEARTBEAT = 10  # seconds without a sign of life after which a process counts as dead
PROCESS = f"""
import json
import sys
import time
import jax
from ml_collections import ConfigDict

jobs, port, num_processes, process, pause = json.loads(sys.argv[1])
if num_processes > 1:
    jax.distributed.initialize(
        f"localhost:{{port}}", num_processes, process, heartbeat_timeout_seconds={HEARTBEAT}
    )
from dense_jax import train
from dense_jax.training import preemption
from tests.shared import share_programs
share_programs(setattr)
requested = preemption.Interrupts.requested
preemption.Interrupts.requested = lambda self, step: time.sleep(pause) or requested(self, step)
for config, path in jobs:
    train.train(ConfigDict(config), path)
"""


# What processes do before they train, here with one that differs from the first.
ALIKE = f"""
import json
import sys
import time
import jax
from jax.experimental import multihost_utils
from dense_jax.command import PREEMPTED
from dense_jax.devices import distributed

path, port, num_processes, process = json.loads(sys.argv[1])
jax.distributed.initialize(
    f"localhost:{{port}}", num_processes, process, heartbeat_timeout_seconds={HEARTBEAT}
)
last = process == num_processes - 1
own = f"{{path}}/{{process}}" if last else path
for check, value in (
    (distributed.agree, lambda: {{"same": [1, None]}}),
    (distributed.agree, lambda: {{"rate": 0.5 if last else 0.1}}),
    (distributed.check_shared, path),
    (distributed.check_shared, own),
):
    try:
        check(value)
        print("check: alike", flush=True)
    except ValueError as error:
        print(f"check: {{error}}", flush=True)
with distributed.together():
    if last:
        raise ValueError("the first")
    if process:
        time.sleep(1)
        raise ValueError("another of its own")
    multihost_utils.sync_global_devices("where the last never comes")
"""
JOIN = """
from absl import app
from dense_jax.command import PREEMPTED
from dense_jax.devices import distributed

distributed.START_TIMEOUT, distributed.TIMEOUT = 1, 1
distributed.define_flags()
app.run(lambda _: distributed.initialize())
"""


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def starter():
    """Starts processes of one device each, which have imported everything."""
    preload = "dense_jax.train", "tests.shared", "jax.experimental.multihost_utils"
    with forked.Starter(*preload, JAX_NUM_CPU_DEVICES="1") as starter:
        yield starter


def start(starter, jobs, num_processes, pause=0.0, others=None):
    """Starts processes, which pause, in seconds, at each step.

    jobs: [(config, path), ...], trained one after the other.
    others: fields that only the first process has as in the config.
    """
    processes, port = [], free_port()
    for k in range(num_processes):
        arguments = []
        for config, path in jobs:
            own = config.copy_and_resolve_references()
            own.update_from_flattened_dict(others or {} if k else {})
            arguments.append([own.to_dict(), str(path)])
        command = [arguments, port, num_processes, k, pause]
        log = log_of(jobs[0][1], k)
        processes.append(starter.start(PROCESS, json.dumps(command), log=log))
    return processes


def log_of(path, process):
    return path.with_name(f"{path.name}.{process}.log")


def wait(processes, path):
    """Exit statuses, once all have ended; fails with what they said where they do not end."""
    try:
        return [process.wait(timeout=200) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        pytest.fail("\n".join(log.read_text() for log in path.parent.glob(f"{path.name}.*.log")))


def records(path):
    return files.read_records(path / "metrics.jsonl")


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
def config(tiny_folder, tmp_path_factory):
    """The config of a small network, on images that evaluation pads to two sizes."""
    root = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("enlarged") / "data")
    for path in root.glob("*/*/*.png"):
        scale = 3 if path.stem == "0" else 4
        pixels = np.kron(np.asarray(Image.open(path)), np.ones((scale, scale), np.uint8))
        Image.fromarray(pixels).save(path)
    config = make_config(root)
    config.model.widths = (3,)
    config.num_steps = 4
    return config


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, config, shared_programs):
    """Runs of one process with four devices: a run, and one of two seeds."""
    folder = tmp_path_factory.mktemp("one")
    train.train(config, str(folder / "run"))
    train.train(with_fields(config, num_seeds=2), str(folder / "seeds"))
    return folder


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory, config, one_process, starter):
    """The same, and an evaluation of the run of one process, by four processes of one device."""
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(one_process / "run", folder / "again")
    (folder / "again" / "result.json").unlink()  # finished but for its result
    seeds = with_fields(config, num_seeds=2)
    jobs = [(config, folder / "run"), (seeds, folder / "seeds"), (config, folder / "again")]
    statuses = wait(start(starter, jobs, 4), folder / "run")
    assert not any(statuses), "\n".join(log.read_text() for log in folder.glob("*.log"))
    return folder


def with_fields(config, **fields):
    config = config.copy_and_resolve_references()
    config.update(fields)
    return config


def test_four_processes_are_the_same_run_as_one(one_process, four_processes):
    assert len(files.read(one_process / "run", "dataset.json")["ladder"]) == 2
    assert_close(four_processes / "run", one_process / "run")


def test_seeds_share_the_processes(one_process, four_processes):
    """Each seed over two of the processes."""
    for seed in ("seed=0", "seed=1"):
        assert_close(four_processes / "seeds" / seed, one_process / "seeds" / seed)


def test_one_checkpoint_has_one_confusion_matrix(one_process, four_processes):
    """However many processes evaluate it."""
    paths = four_processes / "again", one_process / "run"
    final, expected = (files.read(path, "result.json")["final"] for path in paths)
    assert final == expected


@pytest.mark.parametrize(
    ("all_facts", "expected"),
    [
        ([{"a": 1, "b": None}] * 3, []),
        ([{"a": 1}, {"a": 1}, {"a": [2]}], ["a: 1 in process 0, [2] in process 2"]),
        (
            [{"a": 1}, {"b": "x"}],
            ["a: 1 in process 0, null in process 1", 'b: null in process 0, "x"'],
        ),
        ([{"a": True}, {"a": 1}], ["a: true in process 0, 1 in process 1"]),
    ],
)
def test_differences_name_the_fact_the_values_and_the_process(all_facts, expected):
    lines = distributed.differences(all_facts)
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))


def test_processes_compare_config_code_and_workdir(tmp_path, config, monkeypatch):
    def facts(**changes):
        own = config.copy_and_resolve_references()
        own.update_from_flattened_dict(changes)
        folders = ensemble.run_folders(own, epath.Path(tmp_path / "run"))
        return json.loads(json.dumps(task.facts(own, folders)))

    def different(**changes):
        both = distributed.differences([facts(), facts(**changes)])
        return [line.partition(":")[0] for line in both]

    for field, value in (("optimizer.learning_rate", 0.5), ("checkpoint_every", 7), ("seed", 3)):
        assert different(**{field: value}) == [field]
    own = {"data.root": "elsewhere", "data.workers": 9, "data.verify": not config.data.verify}
    assert not different(**own)
    before = facts()
    (tmp_path / "run" / "checkpoints" / "latest" / "4").mkdir(parents=True)
    [line] = distributed.differences([before, facts()])
    assert "--workdir" in line and '"latest": ["4"]' in line
    before = facts()
    monkeypatch.setattr(task, "__file__", str(tmp_path / "training" / "task.py"))
    [line] = distributed.differences([before, facts()])
    assert line.startswith("the code of dense_jax: ")


def test_processes_that_are_not_alike_say_so_and_end_together(tmp_path, starter):
    path, num_processes, port = tmp_path / "run", 3, free_port()
    processes = [
        starter.start(ALIKE, json.dumps([str(path), port, num_processes, k]), log=log_of(path, k))
        for k in range(num_processes)
    ]
    assert wait(processes, path) == [1] * num_processes
    for k in range(num_processes):
        said = log_of(path, k).read_text().splitlines()
        agreed, rate, shared, own = (line for line in said if line.startswith("check: "))
        assert agreed == shared == "check: alike"
        assert rate.endswith("differ in rate: 0.1 in process 0, 0.5 in process 2")
        assert "is not the same folder for process 2" in own
        last = (
            "error: process 2: the first",
            "ValueError: another of its own",
            "ValueError: the first",
        )
        assert said[-1] == last[k]
    assert list(path.iterdir()) == [path / "2"]  # no file is left


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("fewer", "num_examples of the train images: 7 in process 0, 6 in process 1"),
        ("nowhere", "nowhere: no such folder"),
    ],
)
def test_data_of_one_process_end_all_before_anything_is_written(
    tmp_path, tiny_folder, config, starter, root, message
):
    shutil.copytree(tiny_folder, tmp_path / "fewer")
    for kind in ("images", "labels"):
        (tmp_path / "fewer" / kind / "train" / "6.png").unlink()
    path = tmp_path / "run"
    processes = start(starter, [(config, path)], 2, others={"data.root": str(tmp_path / root)})
    assert wait(processes, path) == [1, 1]
    for k in range(2):
        assert message in log_of(path, k).read_text().splitlines()[-1]
    assert not path.exists()


def join(monkeypatch, coordinator):
    given = {"coordinator": coordinator, "process_id": 0, "num_processes": 2}
    flags = types.SimpleNamespace(multihost=False, **given)
    monkeypatch.setattr(distributed.flags, "FLAGS", flags)
    distributed.initialize()


def test_an_address_that_cannot_be_used_is_said_at_once(monkeypatch):
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--coordinator=localhost:{port}: .* port {port}"):
            join(monkeypatch, f"localhost:{port}")
    with pytest.raises(ValueError, match="the host 'nowhere"):
        join(monkeypatch, "nowhere.invalid:1")


def test_ctrl_c_ends_a_process_that_waits_for_the_others_to_join(monkeypatch):
    handlers, before = [], signal.getsignal(signal.SIGINT)

    def initialize(*_, **__):
        handlers.append(signal.getsignal(signal.SIGINT))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    join(monkeypatch, f"localhost:{free_port()}")
    assert handlers == [signal.SIG_DFL] and signal.getsignal(signal.SIGINT) is before


def test_a_process_without_the_others_gives_up():
    flags = [f"--coordinator=localhost:{free_port()}", "--num_processes=2", "--process_id=0"]
    command = [sys.executable, "-c", JOIN, *flags]
    ended = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "not all 2 processes have joined" in ended.stderr.splitlines()[-1]


def test_all_save_the_same_step_when_one_is_preempted(tmp_path, config, starter, shared_programs):
    config = with_fields(config, num_steps=60, eval_every=60, checkpoint_every=60)
    path, expected = tmp_path / "run", tmp_path / "expected"
    # JAX takes a moment to tell all of them: on a fast machine the run would be over by then.
    processes = start(starter, [(config, path)], 2, pause=0.2)
    wait_for_steps(processes, path, 5)
    processes[1].send_signal(signal.SIGINT)  # which it takes for SIGTERM
    assert wait(processes, path) == [PREEMPTED] * 2
    stopped = records(path)[-1]["step"]
    saved = [step.name for step in (path / "checkpoints" / "latest").iterdir()]
    assert saved == [str(stopped)] and 5 <= stopped < config.num_steps
    train.train(config, str(path))  # in another number of processes
    train.train(config, str(expected))
    assert [record["step"] for record in records(path)] == [*range(1, 61), 60]
    assert_close(path, expected)


@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_stop_when_one_is_killed(tmp_path, config, starter, killed):
    config = with_fields(config, num_steps=10**6, eval_every=10**6)
    path = tmp_path / "run"
    processes = start(starter, [(config, path)], 2)
    wait_for_steps(processes, path, 5)
    processes[killed].kill()
    start_of_wait = time.monotonic()
    statuses = wait(processes, path)
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] not in (0, PREEMPTED)
    assert time.monotonic() - start_of_wait < 3 * HEARTBEAT
    assert (path / "checkpoints" / "latest").exists()
