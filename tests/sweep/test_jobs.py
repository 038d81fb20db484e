"""Tests how jobs run: their order, device shares, logs, failures and clean stops."""

import fcntl
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from etils import epath

from dense_jax.sweep import jobs

EVERYTHING = [jobs.Share()]


def make(folder: pathlib.Path, name: str, *programs: str) -> jobs.Job:
    """A job whose commands are Python programs."""
    commands = [[sys.executable, "-S", "-c", program] for program in programs]
    return jobs.Job(name, epath.Path(folder / name), commands)


def test_jobs_run_in_order_past_finished_and_failed_ones(tmp_path, capsys):
    listed = [
        make(tmp_path, "a", "print('one'); raise ValueError('too bad')"),
        make(tmp_path, "b"),
        make(tmp_path, "c", "print('two')", "print('three')"),
    ]
    assert jobs.Runner(listed, EVERYTHING).run() == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "1 of 3 runs are already finished",
        "[1/3] a: starts",
        "[1/3] a: failed (ValueError: too bad) after 00:00; 2 of 3 are done, 00:00 left",
        "[3/3] c: starts",
        "[3/3] c: finished after 00:00; 3 of 3 are done, 00:00 left",
    ]
    assert err.splitlines() == [
        "1 of 3 runs failed; the same command tries them again:",
        f"  a: ValueError: too bad (exit code 1), see {tmp_path}/a/log.txt",
    ]
    failure = json.loads((tmp_path / "a" / "failure.json").read_text())
    assert failure == {"exit_code": 1, "error": "ValueError: too bad"}
    log = (tmp_path / "c" / "log.txt").read_text().splitlines()
    assert log[1::2] == ["two", "three"] and log[0].startswith("$ ")
    assert not (tmp_path / "b").exists()


def test_the_error_of_a_command_is_found_above_what_its_threads_say(tmp_path):
    error = (
        r"print('1\nerror: the fields differ:\n  seed: 0 there\n--------\nException ignored in: f')"
    )
    failing = make(tmp_path, "a", f"{error}; raise SystemExit(1)")
    assert jobs.Runner([failing], EVERYTHING).run() == 1
    failure = json.loads((tmp_path / "a" / "failure.json").read_text())
    assert failure["error"] == "the fields differ: seed: 0 there"


def test_what_follows_a_failure_is_not_run_and_a_new_start_forgets_it(tmp_path):
    first = make(tmp_path, "a", "raise SystemExit(3)", "print('never')")
    assert jobs.Runner([first], EVERYTHING).run() == 1
    failure = json.loads((tmp_path / "a" / "failure.json").read_text())
    assert failure == {"exit_code": 3, "error": "no output"}
    assert "\nnever" not in (tmp_path / "a" / "log.txt").read_text()
    again = make(tmp_path, "a", "import os; assert not os.path.exists('failure.json')")
    assert jobs.Runner([again], EVERYTHING).run() == 0
    assert not (tmp_path / "a" / "failure.json").exists()
    assert (tmp_path / "a" / "log.txt").read_text().count("$ ") == 2


def test_a_preempted_run_stops_all(tmp_path, capsys):
    listed = [
        make(tmp_path, "a", "raise SystemExit(75)", "raise SystemExit(1)"),
        make(tmp_path, "b", "raise SystemExit(1)"),
    ]
    assert jobs.Runner(listed, EVERYTHING).run() == 75
    assert "stopped at a; the same command resumes there" in capsys.readouterr().err
    assert not (tmp_path / "b").exists() and not (tmp_path / "a" / "failure.json").exists()


def test_jobs_at_once_have_their_own_devices(tmp_path):
    core = min(os.sched_getaffinity(0))
    # Each waits for the other, so that one after the other would not end.
    meet = """
import os, pathlib, time
print(os.sched_getaffinity(0), os.environ["CUDA_VISIBLE_DEVICES"])
pathlib.Path(f"{ROOT}/{NAME}.here").touch()
while len(list(pathlib.Path(ROOT).glob("*.here"))) < 2: time.sleep(0.01)
"""
    listed = [make(tmp_path, n, f"ROOT, NAME = {str(tmp_path)!r}, {n!r}\n{meet}") for n in "ab"]
    shares = [jobs.Share(frozenset({core}), {"CUDA_VISIBLE_DEVICES": i}) for i in "01"]
    before = os.sched_getaffinity(0)
    assert jobs.Runner(listed, shares).run() == 0
    assert os.sched_getaffinity(0) == before
    lines = [(tmp_path / name / "log.txt").read_text().splitlines()[-1] for name in "ab"]
    assert sorted(lines) == [f"{{{core}}} 0", f"{{{core}}} 1"]


def test_a_command_that_outlived_its_sweep_is_waited_for(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "log.txt").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        program = "import time; time.sleep(1); print('old')"
        orphan = subprocess.Popen([sys.executable, "-S", "-c", program], stdout=log)
    began = time.monotonic()
    assert jobs.Runner([make(tmp_path, "a", "print('new')")], EVERYTHING).run() == 0
    assert orphan.wait(timeout=10) == 0 and time.monotonic() - began > 0.5
    assert "a is still run by another process: waiting for its end" in capsys.readouterr().out
    log = (tmp_path / "a" / "log.txt").read_text().splitlines()
    assert (log[0], log[-1]) == ("old", "new")


def test_without_logs_output_stays_where_it_is(tmp_path, capfd):
    listed = [make(tmp_path, "a", "print('here'); raise SystemExit(2)")]
    assert jobs.Runner(listed, EVERYTHING, logs=False).run() == 1
    assert "here\n" in capfd.readouterr().out
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["failure.json"]


@pytest.mark.parametrize(
    ("platforms", "visible", "expected"),
    [
        ("", "0,1, 5", ["0", "1", "5"]),
        ("cuda,cpu", "GPU-8f1,GPU-2c0", ["GPU-8f1", "GPU-2c0"]),
        ("cpu", "0,1", []),
        ("", "", []),
        ("", "-1", []),
        ("", None, ["0", "1"]),
    ],
)
def test_gpus_are_those_that_jax_would_use(monkeypatch, tmp_path, platforms, visible, expected):
    listing = "GPU 0: H (UUID: GPU-1)\n  MIG 1g: (UUID: MIG-1)\nGPU 1: H (UUID: GPU-2)\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{listing}'")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert jobs.gpus() == expected


def test_shares_are_equal_and_leave_the_rest(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 4, 6, 7})
    monkeypatch.setattr(jobs, "gpus", lambda: ["3", "4", "5"])
    assert jobs.shares(1) == [jobs.Share()]
    assert jobs.shares(2) == [
        jobs.Share(frozenset({0, 2}), {"CUDA_VISIBLE_DEVICES": "3"}),
        jobs.Share(frozenset({4, 6}), {"CUDA_VISIBLE_DEVICES": "4"}),
    ]
    with pytest.raises(ValueError, match="--jobs=4 at once, but there are 3 GPUs"):
        jobs.shares(4)
    monkeypatch.setattr(jobs, "gpus", list)
    assert [share.environment for share in jobs.shares(5)] == [{}] * 5
    with pytest.raises(ValueError, match="--jobs=6 at once, but there are 5 processor cores"):
        jobs.shares(6)
