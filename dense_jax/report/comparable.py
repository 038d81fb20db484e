"""Which runs may share a table: those whose scores were measured alike.

How a run was trained may differ, that is what a table is for. What it was scored on, and how, may
not. `measure` names that; runs are comparable where all they both name is equal, so that what an
older version did not write down is not held against it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dense_jax.report.reading import Run, mapping

# As evaluation_SPLIT.json has them -> as an error says them.
OF_EVALUATION = {
    "split": "evaluation split",
    "resolution": "resolution",
    "num_images": "images",
    "num_pixels": "valid pixels",
    "class_names": "classes",
    "metric_convention": "metric convention",
}


def measure(runs: Sequence[Run], split: str | None) -> None:
    """Sets what each run's scores were measured on: Run.measured.

    split: whose evaluation they are of; None: they are those of the end of training.
    """
    of_runs: list[dict[str, Any]]
    if split is not None:
        checkpoints = _checkpoints(runs)
        of_runs = [
            {
                **{name: mapping(run.evaluation).get(key) for key, name in OF_EVALUATION.items()},
                "evaluated data": _evaluated_data(mapping(run.evaluation)),
                "checkpoint": checkpoint,
                # From the command line, these may differ from the config's.
                f"tiles of config {run.config_hash}": _tiles(mapping(run.evaluation)),
            }
            for run, checkpoint in zip(runs, checkpoints, strict=True)
        ]
    else:
        of_runs = [
            {
                "evaluation split": run.fields.get("data.eval_split"),
                "resolution": "the labels' own",
                "classes": run.dataset.get("class_names"),
                "metric convention": run.result.get("metric_convention"),
                "dataset": run.fields.get("data.name"),
                # The only trace of the files that training left; other splits have another one.
                f"training data of split {run.fields.get('data.train_split')}": run.training_data,
                "checkpoint": "final",
            }
            for run in runs
        ]
    for run, measured in zip(runs, of_runs, strict=True):
        run.measured = {k: _text(value) for k, value in measured.items() if value is not None}


def conflicts(runs: Sequence[Run]) -> dict[str, dict[str, list[str]]]:
    """What keeps runs from being comparable: name -> value -> names of the runs that have it."""
    found: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for what, value in run.measured.items():
            found.setdefault(what, {}).setdefault(value, []).append(run.name)
    return {what: values for what, values in found.items() if len(values) > 1}


def refuse(found: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    """Raises ValueError with what `conflicts` found, if anything."""
    if not found:
        return
    lines = []
    for what, values in found.items():
        named = [f"{_cut(value)} ({some(names)})" for value, names in values.items()]
        lines.append(f"  {what}: {'; '.join(named)}")
    raise ValueError(
        "the runs are not comparable, their scores were not measured alike:\n"
        + "\n".join(lines)
        + "\nReport them from separate folders, or pass --mixed to have all in one table, told apart."
    )


def number_groups(runs: Sequence[Run]) -> list[str]:
    """For each run the number, from "1", of the comparable ones it belongs to; "" if all are."""
    different = conflicts(runs)
    kinds = [tuple(run.measured.get(what) for what in different) for run in runs]
    distinct = list(dict.fromkeys(kinds))
    return [str(distinct.index(kind) + 1) if different else "" for kind in kinds]


def _checkpoints(runs: Sequence[Run]) -> list[str]:
    """Which checkpoint was evaluated: "best", if that may be said of all runs; else "final"."""

    def is_of(run: Run, kind: str) -> bool:
        step = mapping(run.result.get(kind)).get("step")
        return step is not None and step == mapping(run.evaluation).get("step")

    kinds = ("best", "final")
    if common := [kind for kind in kinds if all(is_of(run, kind) for run in runs)]:
        return [common[0]] * len(runs)
    return [next((k for k in kinds if is_of(run, k)), "neither best nor final") for run in runs]


def _evaluated_data(evaluation: Mapping[str, Any]) -> str | None:
    """Data made in memory has no fingerprint: its name says all."""
    fingerprint = evaluation.get("dataset_fingerprint")
    return str(fingerprint)[:12] if fingerprint else evaluation.get("dataset")


def _tiles(evaluation: Mapping[str, Any]) -> str | None:
    if "tile_size" not in evaluation:
        return None
    tile, margin = (_text(evaluation.get(key)) for key in ("tile_size", "margin"))
    return f"{tile} pixels with a margin of {margin}"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cut(value: str) -> str:
    return value if len(value) <= 120 else f"{value[:117]}..."


def some(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
