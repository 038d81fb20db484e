"""Decides which runs may share a table.

Runs may be trained differently, but must be scored on the same data and in the same way. If the
learning rate of one was tuned, so must be those of all, with as many trials. `measure` records how
each run was scored, as a dict of facts. Two runs are comparable if they agree on
every fact that is recorded for both runs. Runs of several folds are scored on different images, so
that the facts about the images are recorded as those of one fold.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dense_jax.report.reading import RunFolder
from dense_jax.spelling import some


def measure(runs: Sequence[RunFolder], split: str | None) -> None:
    """Sets each run's `measured` to {fact: value}, which describes how the run was scored.

    split: The split whose evaluations contain the scores. If None, the scores are from the end of
      training.
    """
    checkpoints = _checkpoints(runs)
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        facts = _training_facts(run) if split is None else _evaluation_facts(run, checkpoint)
        if any(run.tuning for run in runs):
            facts["learning rates tried"] = _trials(run)
        run.measured = {name: _text(fact) for name, fact in facts.items() if fact is not None}


def _training_facts(run: RunFolder) -> dict[str, Any]:
    return {
        "evaluation split": _split(run, run.fields.get("data.eval_split")),
        "resolution": "the labels' own",
        f"images{_of_fold(run)}": run.result.get("num_eval_images"),
        "classes": run.dataset.get("regions") or run.dataset.get("class_names"),
        "metric convention": run.result.get("metric_convention"),
        "dataset": run.fields.get("data.name"),
        # Only the training split's fingerprint is recorded, and it differs between splits.
        f"training data of split {run.fields.get('data.train_split')}": run.training_data,
        "checkpoint": "final",
    }


def _evaluation_facts(run: RunFolder, checkpoint: str) -> dict[str, Any]:
    evaluation = run.evaluation
    fingerprint, tiles = evaluation.get("dataset_fingerprint"), None
    if "tile_size" in evaluation:
        tile, margin = (_text(evaluation.get(key)) for key in ("tile_size", "margin"))
        tiles = f"{tile} pixels with a margin of {margin}"
    return {
        "evaluation split": _split(run, evaluation.get("split")),
        "resolution": evaluation.get("resolution"),
        f"images{_of_fold(run)}": evaluation.get("num_images"),
        f"valid pixels{_of_fold(run)}": evaluation.get("num_pixels"),
        "classes": evaluation.get("regions") or evaluation.get("class_names"),
        "metric convention": evaluation.get("metric_convention"),
        # Data created in memory has no fingerprint and is identified by name.
        f"evaluated data{_of_fold(run)}": str(fingerprint)[:12]
        if fingerprint
        else evaluation.get("dataset"),
        "checkpoint": checkpoint,
        # Configs may use different tiles, but all runs of one config must use the same tiles.
        f"tiles of config {run.config_hash}": tiles,
    }


def _trials(run: RunFolder) -> str:
    """Returns how many learning rates were tried for a run's row, and with how many seeds."""
    if not run.tuning:
        return "none"
    num_rates, num_seeds = len(run.tuning["rates"]), run.tuning["num_seeds"]
    return f"{num_rates} (with {num_seeds} seed{'s' if num_seeds > 1 else ''} each)"


def _split(run: RunFolder, split: Any) -> Any:
    if run.scored_fold is None:
        return split
    return f"one of {run.data['folds']} folds of {run.data.get('train_split')}"


def _of_fold(run: RunFolder) -> str:
    return "" if run.scored_fold is None else f" of fold {run.scored_fold}"


def _checkpoints(runs: Sequence[RunFolder]) -> list[str]:
    """Returns the evaluated checkpoint of each run: "best", "final" or "neither best nor final".

    If one name fits every run, every run gets this name, so that the runs are comparable. Otherwise,
    a checkpoint that is both best and final is called "best".
    """

    def holds(run: RunFolder, kind: str) -> bool:
        step = (run.result.get(kind) or {}).get("step")
        return step is not None and step == run.evaluation.get("step")

    kinds = ("best", "final")
    if common := [kind for kind in kinds if all(holds(run, kind) for run in runs)]:
        return [common[0]] * len(runs)
    return [next((k for k in kinds if holds(run, k)), "neither best nor final") for run in runs]


def conflicts(runs: Sequence[RunFolder]) -> dict[str, dict[str, list[str]]]:
    """Returns the facts that differ between the runs, as {fact: {value: names of runs}}."""
    facts: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for fact, value in run.measured.items():
            facts.setdefault(fact, {}).setdefault(value, []).append(run.name)
    return {fact: values for fact, values in facts.items() if len(values) > 1}


def refuse(differing: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    """Raises ValueError if `differing`, the result of `conflicts`, is not empty."""
    if not differing:
        return
    lines = []
    for fact, values in differing.items():
        named = [
            f"{value[:117] + '...' if len(value) > 120 else value} ({some(names)})"
            for value, names in values.items()
        ]
        lines.append(f"  {fact}: {'; '.join(named)}")
    raise ValueError(
        "the runs are not comparable, because they were not scored or tuned alike:\n"
        + "\n".join(lines)
        + "\nReport them from separate folders, or pass --mixed for one table with labeled groups."
    )


def number_groups(runs: Sequence[RunFolder]) -> list[str]:
    """Groups runs that were scored in the same way. Returns the group number of each run, as text.

    If all runs are comparable, returns "" for each run.
    """
    facts = conflicts(runs)
    groups = [tuple(run.measured.get(fact) for fact in facts) for run in runs]
    distinct = list(dict.fromkeys(groups))
    return [str(distinct.index(group) + 1) if facts else "" for group in groups]


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
