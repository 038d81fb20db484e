"""The runs of a folder, and the rows that they make: what is shown, before it is a format."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

from dense_jax import workdir

METRICS = {  # as result.json has them -> as a reader does
    "eval/mean_iou": "mean IoU",
    "eval/mean_dice": "mean Dice",
    "eval/pixel_accuracy": "pixel accuracy",
    "eval/mean_accuracy": "mean class accuracy",
}
# How a run is carried out, not what it computes. (data.root stays: another folder, other images.)
OPERATIONAL = {*workdir.OPERATIONAL, "eval_every"}
NOTE = (
    "Scores of the final checkpoint, on the labels' own pixels; ± is the half width of the 95 % "
    "t-interval over the seeds; bold is the highest mean of its column, significant or not."
)
ABSENT = "–"


@dataclasses.dataclass
class Run:
    name: str
    fields: dict[str, Any]  # dotted path -> value
    final: dict[str, Any] | None  # None: not finished
    status: str
    curve: list[tuple[float, float]]  # (step, mean IoU), in the order of steps
    folder: pathlib.Path
    evaluation: dict[str, Any] | None  # evaluation_SPLIT.json


@dataclasses.dataclass
class Row:
    runs: list[Run]
    label: list[str]  # one text per differing field

    def score(self, metric: str) -> tuple[float, float]:
        """Mean over the seeds and half width of its interval; NaN where there is none."""
        return interval([number(run.final, metric) for run in self.runs])

    @property
    def parameters(self) -> int | None:
        """None where the runs disagree or do not say."""
        counts = {number(run.final, "num_parameters") for run in self.runs}
        count = counts.pop()
        return None if counts or math.isnan(count) else int(count)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width: t(0.975, n - 1) * s / sqrt(n), s with n - 1; NaN for n = 1."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    t = scipy.stats.t.ppf(0.975, n - 1)
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / math.sqrt(n))


def number(scores: dict[str, Any] | None, key: str) -> float:
    value = (scores or {}).get(key)
    return math.nan if value is None else float(value)


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """None where there is no such file, or a crash cut it off."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_curve(path: pathlib.Path) -> tuple[int, list[tuple[float, float]]]:
    """The last step logged, and mean IoU by step; a step done again after a restart counts once."""
    last, points = 0, {}
    for record in workdir.read_records(path):
        last = max(last, record["step"])
        if not math.isnan(value := number(record, "eval/mean_iou")):
            points[float(record["step"])] = value
    return last, sorted(points.items())


def read_run(folder: pathlib.Path, root: pathlib.Path, split: str) -> Run:
    name = folder.relative_to(root).as_posix() if folder != root else root.resolve().name
    config, result = read_json(folder / "config.json"), read_json(folder / "result.json")
    last, curve = read_curve(folder / "metrics.jsonl")
    fields = workdir.flatten(config or {})
    status = (result or {}).get(
        "status", f"unfinished, at step {last} of {fields.get('num_steps')}"
    )
    if config is None:
        status = "its config.json cannot be read"
    final = None
    if status == "finished" and result:
        final = {
            **result.get("final", {}),
            "num_parameters": result.get("num_parameters"),
            "cost": result.get("cost"),
        }
    evaluation = read_json(folder / f"evaluation_{split}.json")
    return Run(name, fields, final, status, curve, folder, evaluation)


def build(root: pathlib.Path, split: str = "val") -> tuple[list[str], list[Row], list[str]]:
    """The fields that differ, the rows in their order, and what a reader must know besides."""
    runs = [read_run(path.parent, root, split) for path in sorted(root.rglob("config.json"))]
    if not runs:
        raise ValueError(f"no runs in {root}: no folder in it has a config.json")
    notes = [f"{run.name}: {run.status}" for run in runs if run.final is None]

    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.final is not None:
            fixed = {k: v for k, v in run.fields.items() if k not in OPERATIONAL | {"seed"}}
            same = groups.setdefault(json.dumps(fixed, sort_keys=True), [])
            twin = next((r for r in same if r.fields.get("seed") == run.fields.get("seed")), None)
            if twin is None:
                same.append(run)
            else:  # not an independent sample: it would narrow the interval
                notes.append(f"{run.name}: left out, it repeats the config and seed of {twin.name}")

    ignored = OPERATIONAL | {"seed"}
    configs = [group[0].fields for group in groups.values()]
    paths = [path for path in dict.fromkeys(p for c in configs for p in c) if path not in ignored]
    differing = [p for p in paths if len({json.dumps(c.get(p, ABSENT)) for c in configs}) > 1]
    rows = [
        Row(runs, [text(runs[0].fields.get(path, ABSENT)) for path in differing])
        for runs in sorted(
            groups.values(), key=lambda runs: [order(runs[0].fields.get(p)) for p in differing]
        )
    ]
    if rows and not differing:  # one configuration: named by its folder
        rows[0].label = [root.resolve().name if len(rows[0].runs) > 1 else rows[0].runs[0].name]
    return differing or ["run"], rows, notes


def order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, tuples by length, then names by the alphabet."""
    if isinstance(value, int | float):
        return 0, float(value), ""
    return (1, float(len(value)), str(value)) if isinstance(value, list) else (2, 0.0, str(value))


def text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(text, value)) or "none"
    return "none" if value is None else str(value)
