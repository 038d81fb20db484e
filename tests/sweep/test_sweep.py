"""Tests the sweep command: run order, overrides, resuming and clean stops."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dense_jax import sweep
from tests import forked
from tests.conftest import REPOSITORY

# A package that has its own trainer and else our modules; `python -m` looks first in its folder.
FAKE_PACKAGE = f"__path__.append({str(REPOSITORY / 'dense_jax')!r})"
FAKE_MAIN = """
import json, os, pathlib, signal, sys, time
args = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:] if "=" in arg)
workdir = pathlib.Path(args["workdir"])
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "argv.json").write_text(json.dumps(sys.argv[1:]))
(workdir / "config.json").touch()
if "wait" in os.environ:
    signal.signal(signal.SIGTERM, lambda *_: ((workdir / "saved").touch(), sys.exit(75)))
    (workdir / "ready").touch()
    time.sleep(60)
if args["config.seed"] == "1":
    sys.exit("no such thing")
(workdir / "result.json").write_text('{"status": "finished"}')
"""
FAKE_EVALUATE = """
import pathlib, sys
args = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:])
(pathlib.Path(args["workdir"]) / f"evaluation_{args['split']}.json").touch()
print("evaluated")
"""
CONFIG = """
from ml_collections import ConfigDict
def get_config():
    sections = {"model": {"skips": ()}, "data": {"name": ""}}
    return ConfigDict({"seed": 0, "num_steps": 1, "batch_size": 1, **sections})
"""
EXPERIMENT = f"""{CONFIG}
from dense_jax import sweep
def get_sweep():
    return sweep.grid(**{{"model.skips": [(4, 8), ()], "seed": [0, 1]}})
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a fake trainer and an experiment."""
    package = tmp_path / "dense_jax"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE_PACKAGE)
    (package / "main.py").write_text(FAKE_MAIN)
    (package / "evaluate.py").write_text(FAKE_EVALUATE)
    (tmp_path / "ablation.py").write_text(EXPERIMENT)
    return tmp_path


COMMAND = ["dense_jax.sweep", "--config=ablation.py", "--workdir=runs"]


def call(folder, *arguments):
    """Returns how the commands with these arguments end, one after the other."""
    commands = {i: [*COMMAND, *words.split("|")] for i, words in enumerate(arguments)}
    ends = forked.run_all(commands, "dense_jax.sweep.jobs", cwd=folder, PYTHONPATH=str(folder))
    return list(ends.values())


def test_the_command_runs_lists_and_skips(folder):
    flag = "--config.data.name=my data"
    first, listing, again = call(folder, flag, "--list|--config.batch_size=2", flag)
    assert first.code == 1
    assert first.err.splitlines() == [
        "2 of 4 runs failed; the same command tries them again:",
        "  skips=4-8,seed=1: no such thing (exit code 1), see runs/skips=4-8,seed=1/log.txt",
        "  skips=none,seed=1: no such thing (exit code 1), see runs/skips=none,seed=1/log.txt",
    ]
    argv = json.loads((folder / "runs/skips=4-8,seed=0/argv.json").read_text())
    assert argv == [
        "--config=ablation.py",
        "--workdir=runs/skips=4-8,seed=0",
        "--config.model.skips=(4, 8)",
        "--config.seed=0",
        flag,
    ]
    assert listing.code == 0
    lines = listing.out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["0", "finished", "skips=4-8,seed=0"],
        ["1", "failed", "skips=4-8,seed=1"],
        ["2", "finished", "skips=none,seed=0"],
        ["3", "failed", "skips=none,seed=1"],
    ]
    assert lines[0].endswith("'--config.model.skips=(4, 8)' --config.seed=0 --config.batch_size=2")
    assert again.out.startswith("2 of 4 runs are already finished\n[2/4] skips=4-8,seed=1: starts")


def test_a_finished_sweep_is_not_taken_for_one_with_other_flags(folder):
    _, other = call(folder, "--index=0", "--config.num_steps=500")
    assert other.code == 1
    assert other.err.endswith("  --config.num_steps: 'not set' there, '500' now\n")
    assert "Traceback" not in other.err


def test_each_run_is_evaluated_once(folder):
    splits = ("test", "test", "val")
    ends = call(folder, *(f"--index=0|--evaluate={split}" for split in splits))
    assert [end.code for end in ends] == [0, 0, 0]
    log = (folder / "runs/skips=4-8,seed=0/log.txt").read_text()
    assert (log.count("\nevaluated\n"), log.count("dense_jax.main")) == (2, 1)
    assert log.count("--split=test") == log.count("--split=val") == 1


def test_an_index_runs_that_one_only_and_each_run_is_told_of_the_other_processes(folder):
    peers = ["--coordinator=host:1", "--num_processes=2", "--process_id=0"]
    assert call(folder, "|".join(["--index=2", *peers]))[0].code == 0
    argv = json.loads((folder / "runs/skips=none,seed=0/argv.json").read_text())
    assert argv[2:5] == peers
    made = {path.name for path in (folder / "runs").iterdir()}
    assert made == {"skips=none,seed=0", "sweep.json"}


SAME_SKIPS = "[{'model.skips': (4, 2), 'seed': seed} for seed in (0, 1)]"
MISTAKES = {
    "--index=4": "--index=4 is not in 0..3",
    "--config.seed=3": "--config.seed is what this sweep sets; edit ablation.py",
    "--confg.seed=3": "unexpected argument '--confg.seed=3'; overrides are --config.x=y",
    "--config.batch_size|3": "unexpected argument '--config.batch_size'",
    "--list|--index=1": "--list and --index exclude each other",
    "--index=x": "--index=x",
    "--jobs=2|--index=1": "--jobs is for all runs on this machine",
    "--jobs=2|--multihost": "--jobs is for all runs on this machine",
    "--jobs=0": "--jobs=0",
    "--jobs=1000": "error: --jobs=1000 at once, but there are ",
    "--evaluate=test|--multihost": "--evaluate is for runs of one process",
    "--kept=k|--multihost": "--kept is for runs of one process",
    "--kept=./runs": "--kept and --workdir must be two folders",
    "--process_id=0": "together; missing: --coordinator, --num_processes",
    "--config.sed=1": "error: --config.sed: no such field",
    "--config=sed.py|--config.num_steps=2": "error: --config.sed: no such field",
    "--config=alike.py|--list|--config.model.skips=()": "--config.model.skips is what this sweep",
}


def test_bad_arguments_are_one_clear_error(folder):
    (folder / "sed.py").write_text(f"{CONFIG}\ndef get_sweep(): return [{{'sed': 0}}]")
    (folder / "alike.py").write_text(f"{CONFIG}\ndef get_sweep(): return {SAME_SKIPS}")
    for end, (arguments, message) in zip(call(folder, *MISTAKES), MISTAKES.items(), strict=True):
        assert end.code == 1, arguments
        assert message in end.err + end.out
        assert "Traceback" not in end.err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("number", "num_jobs"), [(signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGHUP, 2)]
)
def test_a_signal_lets_the_current_runs_save_and_starts_no_other(folder, number, num_jobs):
    if num_jobs > len(os.sched_getaffinity(0)):
        pytest.skip("needs as many cores as jobs")
    process = subprocess.Popen(
        [sys.executable, "-m", *COMMAND, f"--jobs={num_jobs}"],
        cwd=folder,
        env={**os.environ, "wait": "1", "JAX_PLATFORMS": "cpu"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    names = ["skips=4-8,seed=0", "skips=4-8,seed=1"][:num_jobs]
    deadline = time.monotonic() + 30
    while not all((folder / "runs" / name / "ready").exists() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as a terminal does
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "stopped at skips=4-8,seed=" in err and "the same command resumes there" in err
    assert all((folder / "runs" / name / "saved").exists() for name in names)
    assert len([path for path in (folder / "runs").iterdir() if path.is_dir()]) == num_jobs


def test_importing_it_brings_neither_jax_nor_flags():
    code = "import sys; from dense_jax import sweep; from absl import flags; "
    code += "assert 'jax' not in sys.modules; assert 'config' not in flags.FLAGS"
    cwd = pathlib.Path(sweep.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=cwd)
