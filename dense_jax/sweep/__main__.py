"""Implements the command `python -m dense_jax.sweep`; see the package's docstring."""

import os
import re
import shlex
import sys
from collections.abc import Sequence

from absl import flags
from etils import epath

from dense_jax import command
from dense_jax.devices import distributed
from dense_jax.sweep import jobs, plan


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the sweep's flags and returns all other arguments, such as --config.x=y."""
    return flags.FLAGS(argv, known_only=True)


def main(argv: Sequence[str]) -> int:
    """Runs or lists the sweep and returns the exit status."""
    args, peers, overrides = flags.FLAGS, distributed.given(), argv[1:]
    given = _check_arguments(overrides, peers)
    directory = epath.Path(args.workdir)
    sweep = plan.load_sweep(args.config)
    names = plan.run_names(sweep)
    changes = [[*plan.as_flags(override), *overrides] for override in sweep]
    for path in given:
        if any(path in override for override in sweep):
            raise ValueError(f"--config.{path} is what this sweep sets; edit {args.config}")
    paths = [*given, *(path for override in sweep for path in override)]
    command.check_fields(command.load_config(args.config), paths)
    if args.index is not None and not 0 <= args.index < len(sweep):
        raise ValueError(f"--index={args.index} is not in 0..{len(sweep) - 1}")
    if args.list:
        for index, (name, change) in enumerate(zip(names, changes, strict=True)):
            print(f"{index:3}  {plan.status(directory / name):10}  {name}  {shlex.join(change)}")
        return 0
    shares = jobs.shares(args.jobs)
    file, colon, argument = args.config.partition(":")
    started = {
        "config": os.path.basename(command.experiment_file(file)) + colon + argument,
        "flags": given,
        "evaluate": args.evaluate,
        "runs": dict(zip(names, sweep, strict=True)),
    }
    gone = plan.remember(directory, started)
    if gone:
        print(f"no longer in the sweep, but still in {directory}: {', '.join(gone)}", flush=True)
    todo = [
        jobs.Job(name, directory / name, _commands(directory / name, [*peers, *change]))
        for name, change in zip(names, changes, strict=True)
    ]
    todo = todo if args.index is None else [todo[args.index]]
    runner = jobs.Runner(todo, shares, logs=not peers)
    runner.stop_on_signals()
    return runner.run()


def _check_arguments(overrides: Sequence[str], peers: Sequence[str]) -> dict[str, str]:
    """Returns the overrides as {dotted.path: text}. Raises ValueError for invalid arguments."""
    for extra in overrides:
        if not re.match(r"--config\.[^=]+=", extra):
            raise ValueError(f"unexpected argument {extra!r}; overrides are --config.x=y")
    args = flags.FLAGS
    if args.list and args.index is not None:
        raise ValueError("--list and --index exclude each other")
    if args.jobs > 1 and (peers or args.index is not None):
        raise ValueError("--jobs is for all runs on this machine, without --index or other hosts")
    if args.evaluate and peers:
        raise ValueError("--evaluate is for runs of one process: evaluate them afterwards")
    return dict(extra.removeprefix("--config.").split("=", 1) for extra in overrides)


def _commands(workdir: epath.Path, arguments: Sequence[str]) -> list[list[str]]:
    """Returns the training and evaluation commands that a workdir still needs."""
    args, python = flags.FLAGS, [sys.executable, "-m"]
    commands = []
    if not plan.is_finished(workdir):
        train = [*python, "dense_jax.main", f"--config={args.config}", f"--workdir={workdir}"]
        commands.append([*train, *arguments])
    if args.evaluate and not plan.is_evaluated(workdir, args.evaluate):
        score = [*python, "dense_jax.evaluate", f"--workdir={workdir}", f"--split={args.evaluate}"]
        commands.append(score)
    return commands


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Experiment with get_sweep().", required=True)
    command.define_folder("workdir", "Folder for the runs' workdirs.", required=True)
    flags.DEFINE_bool("list", False, "Print the runs and exit.")
    flags.DEFINE_integer("index", None, "Run only the run with this index, from 0.")
    flags.DEFINE_integer("jobs", 1, "Runs at once, on equal shares of the machine.", lower_bound=1)
    flags.DEFINE_string("evaluate", None, "Split that dense_jax.evaluate scores after each run.")
    distributed.define_flags()  # passed on to every run
    command.run(main, flags_parser=parse_flags)
