"""Runs a sweep: every configuration that an experiment file's `get_sweep()` lists, one by one.

    python -m dense_jax.sweep --config=experiments/ablation.py --workdir=DIR
    python -m dense_jax.sweep --config=... --workdir=DIR --list      # runs, flags and states
    python -m dense_jax.sweep --config=... --workdir=DIR --index=3   # that one only
    python -m dense_jax.sweep ... --config.data.name=folder          # passed on to every run

A sweep is plain data: a list of `{dotted.path: value}`, each what one run changes in the config.
Each run is a process of its own, `python -m dense_jax.main`, in DIR/RUN_NAME. The same command
goes on where it was: finished runs are skipped, unfinished ones resumed, failed ones tried again.

Experiment files import this module for `grid`, inside any command: so it never imports jax, and
defines its flags only when it is the command.
"""

import importlib.util
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from etils import epath  # like pathlib, also for gs://

from dense_jax import distributed

Override = dict[str, Any]

PREEMPTED = os.EX_TEMPFAIL  # 75: the trainer saved and stopped; the same command resumes
MAX_NAME = 200  # characters; file systems take 255 bytes


def grid(**axes: Sequence[Any]) -> list[Override]:
    """Every combination of the axes' values; the last axis varies fastest.

    Dotted paths go in as `grid(**{"model.upsampling": ["bilinear", "nearest"], "seed": [0, 1]})`.
    """
    for path, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"axis {path!r} needs a list of values, got {values!r}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def as_flags(override: Override) -> list[str]:
    """The override as command-line flags of dense_jax.main; ValueError for None."""
    for path, value in override.items():
        if value is None:  # would arrive as the word "None", or not at all
            raise ValueError(f"{path}=None cannot be written as a flag; use a value that means off")
    return [f"--config.{path}={value}" for path, value in override.items()]


def run_name(override: Override, sweep: Sequence[Override]) -> str:
    """A folder name made of what differs between the runs: `upsampling=bilinear,skips=4-2,seed=0`.

    The seed is named even where all share it: a sweep often starts with one seed and gets more,
    and must then find its runs again.
    """
    paths = list(dict.fromkeys(path for other in sweep for path in other))
    named = [path for path in paths if path == "seed" or _differs(path, sweep)]
    parts = [f"{_short(p, named)}={_text(override[p])}" for p in named if p in override]
    return ",".join(parts) or "default"


def run_names(sweep: Sequence[Override]) -> list[str]:
    """One name per run; ValueError where two runs would share a folder."""
    names = [run_name(override, sweep) for override in sweep]
    taken: dict[str, int] = {}
    for index, name in enumerate(names):
        if len(name) > MAX_NAME:
            raise ValueError(f"run {index} has a name of {len(name)} characters, over {MAX_NAME}")
        other = taken.setdefault(name.casefold(), index)  # some file systems ignore case
        if other != index:
            raise ValueError(
                f"runs {other} and {index} of the sweep would share the folder {name!r}: "
                f"{sweep[other]} and {sweep[index]}; make them differ or remove one"
            )
    return names


def _differs(path: str, sweep: Sequence[Override]) -> bool:
    absent = object()
    return len({repr(override.get(path, absent)) for override in sweep}) > 1


def _short(path: str, paths: Sequence[str]) -> str:
    """The shortest end of `path`, in whole words, that no other path has."""
    words = path.split(".")
    ends = (".".join(words[i:]) for i in reversed(range(len(words))))
    others = [f".{other}" for other in paths if other != path]
    return next((end for end in ends if not any(o.endswith(f".{end}") for o in others)), path)


def _text(value: Any) -> str:
    """The value in characters that any file system, shell and bucket takes."""
    if isinstance(value, dict):
        return "-".join(f"{key}-{_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return "-".join(map(_text, value)) or "none"
    return re.sub(r"[^A-Za-z0-9._+-]", "_", str(value)) or "none"


def load_sweep(path: str) -> list[Override]:
    """Calls `get_sweep()` of an experiment file; ValueError names what is wrong with it."""
    file = path.split(":")[0]  # ml_collections passes what follows the colon to get_config
    if not os.path.isfile(file):
        raise ValueError(f"no experiment file {file!r} (seen from {os.getcwd()})")
    spec = importlib.util.spec_from_file_location("sweep_experiment", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_sweep"):
        raise ValueError(f"{file} has no get_sweep(): to train it once, use dense_jax.main")
    sweep = module.get_sweep()
    if not isinstance(sweep, list) or not all(isinstance(override, dict) for override in sweep):
        raise ValueError(f"get_sweep() of {file} must return a list of dicts, got {sweep!r}")
    if not sweep:
        raise ValueError(f"get_sweep() of {file} is an empty list: nothing to run")
    return sweep


def state(workdir: epath.Path) -> str:
    """`finished`, `unfinished` (started, so it resumes) or `new`."""
    try:
        result = json.loads((workdir / "result.json").read_text())
        if result.get("status") == "finished":
            return "finished"
    except (OSError, ValueError):  # not there, or cut off by a crash
        pass
    return "unfinished" if workdir.exists() else "new"


class Runner:
    """Runs one command at a time; a signal to us becomes SIGTERM to it, so that it can save."""

    def __init__(self):
        self.child: subprocess.Popen | None = None
        self.stopped = False

    def install(self) -> None:
        """Ctrl-C, a launcher's SIGTERM and a closed terminal stop the sweep; nohup still works."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.stop)

    def stop(self, number: int, frame: object = None) -> None:
        self.stopped = True
        if self.child is not None:
            self.child.terminate()

    def __call__(self, command: list[str]) -> int:
        """Returns the exit code, PREEMPTED if we were stopped."""
        code = PREEMPTED
        if not self.stopped:
            # In a group of its own: Ctrl-C would reach it as SIGINT too, which does not save.
            self.child = subprocess.Popen(command, process_group=0)
            if self.stopped:  # while it was being started
                self.child.terminate()
            code = self.child.wait()
        return PREEMPTED if self.stopped else code


def run_sweep(
    runs: Sequence[tuple[str, epath.Path, list[str]]],
    run: Callable[[list[str]], int],
) -> int:
    """Runs (name, workdir, command) in order and returns the exit code.

    0: all are finished; 1: some failed, the others ran; 75: stopped, the same command resumes.
    """
    failed = []
    for number, (name, workdir, command) in enumerate(runs, 1):
        where = f"[{number}/{len(runs)}] {name}"
        before = state(workdir)
        if before == "finished":
            print(f"{where}: already finished", flush=True)
            continue
        print(f"{where}: {'resumes' if before == 'unfinished' else 'starts'}", flush=True)
        code = run(command)
        if code == PREEMPTED:
            print(f"stopped at {name}; the same command resumes there", file=sys.stderr)
            return PREEMPTED
        if code:
            failed.append(f"  {name} (exit code {code})")
            print(f"{where}: failed with exit code {code}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed:", *failed, sep="\n", file=sys.stderr)
        return 1
    print(f"all {len(runs)} runs are finished")
    return 0


def define_flags() -> None:
    """Defines the command's flags, under the names that dense_jax.main has for its own."""
    flags.DEFINE_string("config", None, "Experiment file with a get_sweep().", required=True)
    flags.DEFINE_string("workdir", None, "Each run gets a folder in it.", required=True)
    flags.DEFINE_bool("list", False, "Print the runs and exit.")
    flags.DEFINE_integer("index", None, "Run only this one, counted from 0.")
    distributed.define_flags()  # passed on to every run


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Leaves unknown flags in argv: absl would reject --config.x=y, which only the runs know."""
    try:
        return flags.FLAGS(argv, known_only=True)
    except flags.Error as error:
        sys.exit(f"{error}\nPass --helpshort to see the flags.")


def main(argv: Sequence[str]) -> int:
    args = flags.FLAGS
    for extra in argv[1:]:
        if not re.match(r"--config\.[^=]+=", extra):
            raise app.UsageError(f"unexpected argument {extra!r}; overrides are --config.x=y")
    if args.list and args.index is not None:
        raise app.UsageError("--list and --index exclude each other")
    try:
        sweep = load_sweep(args.config)
        names = run_names(sweep)
        changes = [[*as_flags(override), *argv[1:]] for override in sweep]  # the last one wins
    except ValueError as error:
        sys.exit(f"error: {error}")
    for path in (extra[len("--config.") :].split("=")[0] for extra in argv[1:]):
        if _differs(path, sweep):
            sys.exit(f"error: --config.{path} is what this sweep varies; edit {args.config}")
    if args.index is not None and not 0 <= args.index < len(sweep):
        sys.exit(f"error: --index={args.index} is not in 0..{len(sweep) - 1}")

    command = [sys.executable, "-m", "dense_jax.main", f"--config={args.config}"]
    command += distributed.given()
    workdirs = [epath.Path(args.workdir) / name for name in names]
    if args.list:
        for index, (name, workdir) in enumerate(zip(names, workdirs, strict=True)):
            print(f"{index:3}  {state(workdir):10}  {name}  {shlex.join(changes[index])}")
        return 0
    runs = [
        (name, workdir, [*command, f"--workdir={workdir}", *change])
        for name, workdir, change in zip(names, workdirs, changes, strict=True)
    ]
    runner = Runner()
    runner.install()
    return run_sweep(runs if args.index is None else [runs[args.index]], runner)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
