"""Tunes the learning rate of each row of a sweep.

A row is the runs that differ only in the seed and the fold. Its rates are a list in its overrides:

    {"loss": "soft_dice", "optimizer.learning_rate": [0.001, 0.003, 0.01], "seed": 0}

A trial trains the row with one of the rates and with the seed SEED, which no run has, so that no
run is the luckiest of several. It takes all steps, and holds out the first fold if there are folds.
The row's runs then train with the rate of the best trial, the one whose best checkpoint has the
highest mean IoU on data.eval_split. The first of equal rates wins. A trial that diverges loses.
With num_seeds, a trial's score is the mean over its seeds, from SEED on. The report does not
compare rows with different numbers of trials.
"""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from dense_jax import storage
from dense_jax.sweep import plan
from dense_jax.sweep.plan import Override
from dense_jax.workdir import files

RATE = "optimizer.learning_rate"
SEED = 1000


class Run(NamedTuple):
    """A run or a trial of a sweep.

    name: The name of its folder, from the folder of the sweep.
    trials: The names of the trials that choose its learning rate, in the order of the rates.
    """

    name: str
    override: Override
    trials: tuple[str, ...] = ()


def expand(sweep: Sequence[Override]) -> list[Run]:
    """Returns the trials of a sweep, and then its runs. Raises ValueError for invalid rates."""
    rows: dict[str, range] = {}  # the numbers of each row's trials
    trials: list[Override] = []
    keys = [_row(override) for override in sweep]
    for override, key in zip(sweep, keys, strict=True):
        rates = override.get(RATE)
        if not isinstance(rates, list | tuple):
            continue
        if not rates:
            raise ValueError(f"{RATE} is an empty list in {override}: give at least one rate")
        if override.get("seed") == SEED:
            raise ValueError(f"seed {SEED} is that of the trials: use another one in {override}")
        if key not in rows:
            rows[key] = range(len(trials), len(trials) + len(rates))
            trials += [override | {RATE: rate, "seed": SEED} for rate in rates]
    names = [f"{files.TRIALS}/{name}" for name in plan.run_names(trials)]
    runs = zip(plan.run_names(sweep), sweep, keys, strict=True)
    return [
        *map(Run, names, trials),
        *(Run(name, run, tuple(names[i] for i in rows.get(key, ()))) for name, run, key in runs),
    ]


def _row(override: Override) -> str:
    """Returns what the runs of a row have in common."""
    kept = {path: value for path, value in override.items() if path not in ("seed", "data.fold")}
    return json.dumps(kept, sort_keys=True, default=repr)


def resolve(run: Run, directory: epath.Path) -> Override | None:
    """Returns the override of a run, with the chosen learning rate if the run has trials.

    Returns None if a trial is not finished, or if none has a score.
    """
    if not run.trials:
        return run.override
    scores = [
        score for trial in run.trials if (score := trial_score(directory / trial)) is not None
    ]
    if len(scores) < len(run.trials) or np.all(np.isnan(scores)):
        return None
    return run.override | {RATE: run.override[RATE][int(np.nanargmax(scores))]}


def trial_score(workdir: epath.Path) -> float | None:
    """Returns the score of a trial. It is NaN if the trial diverged, and None if it has no end."""
    if plan.is_finished(workdir):
        bests = [files.read_intact(run / "result.json").get("best") for run in files.runs(workdir)]
        scores = [(best or {}).get("eval/mean_iou") for best in bests]
        return float(np.mean(np.array(scores, float)))  # None becomes NaN
    error = str(files.read_intact(workdir / plan.FAILURE).get("error"))
    return math.nan if files.NOT_FINITE in error else None


def record(run: Run, directory: epath.Path) -> None:
    """Writes tuning.json, the scores of the trials, to the workdir of a finished run."""
    if not run.trials:
        return
    trials = [directory / trial for trial in run.trials]
    about = {
        "rates": run.override[RATE],
        "scores": list(map(trial_score, trials)),
        "num_seeds": len(files.runs(trials[0])),
    }
    for workdir in files.runs(directory / run.name):
        storage.write_json(workdir / files.TUNING, about)
