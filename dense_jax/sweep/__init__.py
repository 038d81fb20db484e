"""Runs a sweep: every configuration that an experiment file's `get_sweep()` lists.

    python -m dense_jax.sweep --config=experiments/ablation.py --workdir=DIR
    python -m dense_jax.sweep ... --jobs=2                   # two at once, on this machine
    python -m dense_jax.sweep ... --evaluate=test            # and dense_jax.evaluate of each
    python -m dense_jax.sweep ... --list                     # runs, flags and states
    python -m dense_jax.sweep ... --index=3                  # that one only
    python -m dense_jax.sweep ... --config.data.name=folder  # passed on to every run

A sweep is plain data: a list of `{dotted.path: value}`, each what one run changes in the config.
Each run is a process of its own, `python -m dense_jax.main`, in DIR/RUN_NAME, and its output is in
log.txt there. The same command goes on where it was: finished runs are skipped, unfinished ones
resumed, failed ones tried again. DIR/sweep.json says what they are runs of.

Experiment files import this module for `grid`, inside any command: so it never imports jax, and
defines its flags only when it is the command.
"""

import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath  # like pathlib, also for gs://

from dense_jax import command, storage
from dense_jax.devices import distributed
from dense_jax.sweep import jobs
from dense_jax.workdir.files import check_path, read_json, runs

Override = dict[str, Any]

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
    and must then find its runs again. Where runs have a `label`, it stands for all that goes with
    it.
    """
    paths = list(dict.fromkeys(path for other in sweep for path in other))
    named = [
        path
        for path in paths
        if path in ("seed", "label") or (_differs(path, sweep) and not _follows(path, sweep))
    ]
    named.sort(key="seed".__eq__)  # last, wherever the list has it
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


def _follows(path: str, sweep: Sequence[Override]) -> bool:
    """Whether the labels of the runs tell the value."""
    labels = {override.get("label") for override in sweep}
    same = ([other for other in sweep if other.get("label") == label] for label in labels)
    return None not in labels and not any(_differs(path, runs) for runs in same)


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
    module, file = command.experiment(path), path.partition(":")[0]
    if not hasattr(module, "get_sweep"):
        raise ValueError(f"{file} has no get_sweep(): to train it once, use dense_jax.main")
    sweep = module.get_sweep()
    if not isinstance(sweep, list) or not all(isinstance(override, dict) for override in sweep):
        raise ValueError(f"get_sweep() of {file} must return a list of dicts, got {sweep!r}")
    if not sweep:
        raise ValueError(f"get_sweep() of {file} is an empty list: nothing to run")
    return sweep


def state(workdir: epath.Path) -> str:
    """`finished`, `failed`, `unfinished` (started, so it resumes) or `new`."""
    if (workdir / jobs.FAILURE).exists():
        return "failed"
    if is_finished(workdir):
        return "finished"
    return "unfinished" if workdir.exists() else "new"


def is_finished(workdir: epath.Path) -> bool:
    results = (_read_json(each / "result.json") for each in runs(workdir))
    return all(result.get("status") == "finished" for result in results)


def is_evaluated(workdir: epath.Path, split: str) -> bool:
    """Whether the split was scored after the run was finished."""

    def is_newer(run: epath.Path) -> bool:
        evaluation, result = run / f"evaluation_{split}.json", run / "result.json"
        return evaluation.exists() and os.path.getmtime(evaluation) >= os.path.getmtime(result)

    return is_finished(workdir) and all(map(is_newer, runs(workdir)))


def remember(directory: epath.Path, started: dict[str, Any]) -> list[str]:
    """Writes DIR/sweep.json: what the runs in DIR are of. Returns those that are not in it now.

    started: the config file, the flags {dotted path: text}, the split to evaluate, and the runs
      {name: override}. It may get and lose runs, and another split.

    Raises ValueError, listing what differs, if DIR has runs of another config: finished ones would
    be taken for those of this one; and if no run can save its checkpoints there. A run without
    config.json never began, so it binds to nothing.
    """
    check_path(directory)
    path = directory / "sweep.json"
    old = _read_json(path)
    begun = {
        name: override
        for name, override in old.get("runs", {}).items()
        if any((each / "config.json").exists() for each in runs(directory / name))
    }
    new = json.loads(json.dumps(started))  # tuples are lists there
    if begun:
        different = _differences("--config", {"": old["config"]}, {"": new["config"]})
        different += _differences("--config.", old["flags"], new["flags"])
        for name in begun.keys() & new["runs"].keys():
            different += _differences(f"{name}: ", begun[name], new["runs"][name])
        if different:
            raise ValueError(
                f"{directory} has runs of another config. Use another --workdir, or start the "
                "sweep as before. What differs:\n" + "\n".join(different)
            )
    storage.write_json(
        path, new | {"runs": begun | new["runs"]}
    )  # others may start now, by --index
    return [name for name in begun if name not in new["runs"]]


def _differences(what: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"  {what}{key}: {old.get(key, 'not set')!r} there, {new.get(key, 'not set')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "not set") != new.get(key, "not set")
    ]


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):  # not there, or cut off by a crash
        return {}


def define_flags() -> None:
    """Defines the command's flags, under the names that dense_jax.main has for its own."""
    flags.DEFINE_string("config", None, "Experiment file with a get_sweep().", required=True)
    command.define_folder("workdir", "Each run gets a folder in it.", required=True)
    flags.DEFINE_bool("list", False, "Print the runs and exit.")
    flags.DEFINE_integer("index", None, "Run only this one, counted from 0.")
    flags.DEFINE_integer("jobs", 1, "Runs at once; cores and GPUs are shared out.", lower_bound=1)
    flags.DEFINE_string("evaluate", None, "Split that dense_jax.evaluate scores after each run.")
    distributed.define_flags()  # passed on to every run


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Leaves unknown flags in argv: absl would reject --config.x=y, which only the runs know."""
    return flags.FLAGS(argv, known_only=True)


def main(argv: Sequence[str]) -> int:
    args, peers = flags.FLAGS, distributed.given()
    for extra in argv[1:]:
        if not re.match(r"--config\.[^=]+=", extra):
            raise ValueError(f"unexpected argument {extra!r}; overrides are --config.x=y")
    given = dict(extra.removeprefix("--config.").split("=", 1) for extra in argv[1:])
    if args.list and args.index is not None:
        raise ValueError("--list and --index exclude each other")
    if args.jobs > 1 and (peers or args.index is not None):
        raise ValueError("--jobs is for all runs on this machine: not for one, nor with others")
    if args.evaluate and peers:
        raise ValueError("--evaluate is for runs of one process: evaluate them afterwards")
    directory = epath.Path(args.workdir)
    sweep = load_sweep(args.config)
    names = run_names(sweep)
    changes = [[*as_flags(override), *argv[1:]] for override in sweep]
    for path in given:
        if any(path in override for override in sweep):
            raise ValueError(f"--config.{path} is what this sweep sets; edit {args.config}")
    command.check_fields(args.config, [*given, *(path for override in sweep for path in override)])
    if args.index is not None and not 0 <= args.index < len(sweep):
        raise ValueError(f"--index={args.index} is not in 0..{len(sweep) - 1}")
    if args.list:
        for index, (name, change) in enumerate(zip(names, changes, strict=True)):
            print(f"{index:3}  {state(directory / name):10}  {name}  {shlex.join(change)}")
        return 0
    shares = jobs.shares(args.jobs)
    started = {
        "config": os.path.basename(args.config),
        "flags": given,
        "evaluate": args.evaluate,
        "runs": dict(zip(names, sweep, strict=True)),
    }
    gone = remember(directory, started)
    if gone:
        print(f"no longer in the list, but still in {directory}: {', '.join(gone)}", flush=True)

    def job(name: str, change: list[str]) -> jobs.Job:
        workdir = directory / name
        train = [f"--config={args.config}", *peers, f"--workdir={workdir}", *change]
        score = [f"--workdir={workdir}", f"--split={args.evaluate}"]
        commands = []
        if not is_finished(workdir):
            commands.append([sys.executable, "-m", "dense_jax.main", *train])
        if args.evaluate and not is_evaluated(workdir, args.evaluate):
            commands.append([sys.executable, "-m", "dense_jax.evaluate", *score])
        return jobs.Job(name, workdir, commands)

    listed = [job(name, change) for name, change in zip(names, changes, strict=True)]
    runner = jobs.Runner()
    runner.install()
    return jobs.run_all(
        listed if args.index is None else [listed[args.index]], shares, runner, logs=not peers
    )
