"""Implements the command `python -m dense_jax.sweep`; see the package's docstring."""

import functools
import os
import re
import shlex
import sys
from collections.abc import Sequence

from absl import flags
from etils import epath

from dense_jax import command
from dense_jax.devices import distributed
from dense_jax.sweep import jobs, keep, plan, tuning


def main(argv: Sequence[str]) -> int:
    """Runs or lists the sweep and returns the exit status."""
    args, peers, overrides = flags.FLAGS, distributed.given(), argv[1:]
    given = _check_arguments(overrides, peers)
    directory = epath.Path(args.workdir)
    kept = epath.Path(args.kept) if args.kept else None
    runs = tuning.expand(plan.load_sweep(args.config))
    for path in given:
        if any(path in run.override for run in runs):
            raise ValueError(f"--config.{path} is what this sweep sets; edit {args.config}")
    paths = [*given, *(path for run in runs for path in run.override)]
    command.check_fields(command.load_config(args.config), paths)
    if args.index is not None and not 0 <= args.index < len(runs):
        raise ValueError(f"--index={args.index} is not in 0..{len(runs) - 1}")
    if args.list:
        return _list(runs, directory, kept, overrides)
    shares = jobs.shares(args.jobs)
    file, colon, argument = args.config.partition(":")
    started = {
        "config": os.path.basename(command.experiment_file(file)) + colon + argument,
        "flags": given,
        "evaluate": args.evaluate,
        "runs": {run.name: run.override for run in runs},
    }
    gone = plan.remember(directory, started)
    if gone:
        print(f"no longer in the sweep, but still in {directory}: {', '.join(gone)}", flush=True)
    if kept:
        plan.remember(kept, keep.portable(started))
    todo = runs if args.index is None else [runs[args.index]]
    names = {trial for run in runs for trial in run.trials}
    trials = [run for run in todo if run.name in names]
    others = [run for run in todo if run.name not in names]
    code = 0
    if trials:
        print(f"{len(trials)} trials of learning rates come first", flush=True)
        code = _run(trials, directory, kept, shares, overrides, None)
    if others and code != command.PREEMPTED:
        ready = [run for run in others if tuning.resolve(run, directory) is not None]
        code = _run(ready, directory, kept, shares, overrides, args.evaluate) if ready else 1
        if code != command.PREEMPTED and len(ready) < len(others):
            waiting = "\n  ".join(run.name for run in others if run not in ready)
            print(f"not started, because their trials have no score:\n  {waiting}", file=sys.stderr)
            return 1
    return code


def _list(
    runs: Sequence[tuning.Run],
    directory: epath.Path,
    kept: epath.Path | None,
    overrides: Sequence[str],
) -> int:
    """Prints the runs, with their statuses and flags. Returns the exit status."""
    for index, run in enumerate(runs):
        state = plan.status(directory / run.name)
        if state == "new" and kept and plan.is_finished(kept / run.name):
            state = "kept"
        change = plan.as_flags(tuning.resolve(run, directory) or run.override)
        print(f"{index:3}  {state:10}  {run.name}  {shlex.join([*change, *overrides])}")
    return 0


def _run(
    runs: Sequence[tuning.Run],
    directory: epath.Path,
    kept: epath.Path | None,
    shares: Sequence[jobs.Share],
    overrides: Sequence[str],
    split: str | None,
) -> int:
    """Does what the runs still need, and returns the exit status.

    kept: The folder to take finished runs from, and to copy their small files to.
    overrides: The arguments --config.x=y that all runs have.
    split: The split to evaluate, if any.
    """
    named, peers, todo = {run.name: run for run in runs}, distributed.given(), []
    for run in runs:
        workdir = directory / run.name
        change = [*plan.as_flags(tuning.resolve(run, directory) or {}), *overrides]
        if kept:
            config = command.changed_config(flags.FLAGS.config, change)
            keep.restore(kept / run.name, workdir, config, split)
        todo.append(jobs.Job(run.name, workdir, _commands(workdir, [*peers, *change], split)))

    def finish(job: jobs.Job) -> None:
        tuning.record(named[job.name], directory)
        if kept:
            keep.save(job.workdir, kept / job.name)

    for job in todo:
        if not job.commands:
            finish(job)
    runner = jobs.Runner(todo, shares, logs=not peers, finish=finish)
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
    if args.kept and peers:
        raise ValueError("--kept is for runs of one process: pass it to a later start, of one")
    if args.kept and epath.Path(args.kept).resolve() == epath.Path(args.workdir).resolve():
        raise ValueError("--kept and --workdir must be two folders")
    return dict(extra.removeprefix("--config.").split("=", 1) for extra in overrides)


def _commands(workdir: epath.Path, arguments: Sequence[str], split: str | None) -> list[list[str]]:
    """Returns the training and evaluation commands that a workdir still needs."""
    args, python = flags.FLAGS, [sys.executable, "-m"]
    commands = []
    if not plan.is_finished(workdir):
        train = [*python, "dense_jax.main", f"--config={args.config}", f"--workdir={workdir}"]
        commands.append([*train, *arguments])
    if split and not plan.is_evaluated(workdir, split):
        score = [*python, "dense_jax.evaluate", f"--workdir={workdir}", f"--split={split}"]
        commands.append(score)
    return commands


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Experiment with get_sweep().", required=True)
    command.define_folder(
        "workdir", "Folder for the runs' workdirs.", required=True, bucket="output"
    )
    flags.DEFINE_bool("list", False, "Print the runs and exit.")
    flags.DEFINE_integer("index", None, "Run only the run with this index, from 0.")
    flags.DEFINE_integer("jobs", 1, "Runs at once, on equal shares of the machine.", lower_bound=1)
    flags.DEFINE_string("evaluate", None, "Split that dense_jax.evaluate scores after each run.")
    command.define_folder("kept", "Folder that keeps finished runs, which are then not run again.")
    distributed.define_flags()  # passed on to every run
    # The other arguments, such as --config.x=y, are for the runs.
    command.run(main, flags_parser=functools.partial(flags.FLAGS, known_only=True))
