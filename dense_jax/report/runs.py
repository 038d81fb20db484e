"""The runs of a folder, and the rows that they make: what is shown, before it is a format."""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dense_jax.report import comparable, statistics
from dense_jax.report.reading import OPERATIONAL, Run, find_runs, number
from dense_jax.workdir.files import differing_fields

METRICS = {  # as result.json has them -> as a reader does
    "eval/mean_iou": "mean IoU",
    "eval/mean_dice": "mean Dice",
    "eval/pixel_accuracy": "pixel accuracy",
    "eval/mean_accuracy": "mean class accuracy",
}
BOUNDARY_METRICS = {  # of `dense_jax.evaluate` only
    "eval/mean_over_images/mean_boundary_f1": "boundary F1",
    "eval/mean_boundary_iou": "boundary IoU",
}
NOTE = (
    "Scores are means over the seeds, on the labels' own pixels (–: a seed has none); ± is the half "
    "width of the 95 % t-interval over the seeds; bold is the highest mean of its column, "
    "significant or not; * is a difference from the baseline row with p < 0.05, two-sided paired "
    "t-test over the shared seeds, after Holm's correction for the rows of its column."
)
ABSENT = "–"
# Control characters but tabs and new lines, directions of text, and halves of characters.
_INVISIBLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclasses.dataclass
class Row:
    runs: list[Run]
    label: list[str]  # one text per differing field
    # The columns: as result.json has them -> as a reader does; the same for all rows.
    metrics: dict[str, str] = dataclasses.field(default_factory=lambda: METRICS)
    group: str = ""  # of comparable runs; see comparable.number_groups
    is_baseline: bool = False
    # Against the baseline, corrected; no entry, or NaN, where there is no test.
    p_values: dict[str, float] = dataclasses.field(default_factory=dict)

    def score(self, metric: str) -> tuple[float, float]:
        """Mean over the seeds and half width of its interval; NaN where there is none."""
        return statistics.interval([number(run.scores or {}, metric) for run in self.runs])

    def p_value(self, metric: str) -> float:
        return self.p_values.get(metric, math.nan)

    def of_seeds(self, metric: str) -> dict[str, float]:
        """The scores that exist, by seed."""
        values = {
            str(run.fields.get("seed")): number(run.scores or {}, metric) for run in self.runs
        }
        return {seed: value for seed, value in values.items() if not math.isnan(value)}

    @property
    def parameters(self) -> int | None:
        """None where the runs disagree or do not say."""
        counts = {number(run.result, "num_parameters") for run in self.runs}
        count = counts.pop()
        return None if counts or math.isnan(count) else int(count)

    def cost(self, key: str) -> float:
        """Mean over the seeds that state it; NaN if none does."""
        values = [number(run.cost, key) for run in self.runs]
        stated = [value for value in values if not math.isnan(value)]
        return float(np.mean(stated)) if stated else math.nan


def build(
    root: pathlib.Path,
    split: str | None = None,
    *,
    per_class: bool = False,
    baseline: str | None = None,
    mixed: bool = False,
) -> tuple[list[str], list[Row], list[str]]:
    """The fields that differ, the rows in their order, and which runs are in no row, and why.

    split: whose evaluation_SPLIT.json the scores are; None: those of the end of training.
    per_class: whether columns of each class's IoU follow.
    baseline: FIELD=VALUE,... of the row to test against; None: the first.
    mixed: whether runs that are not comparable may share the table.

    Raises ValueError if there is no run, if runs are not comparable, or if the baseline is not one
    row.
    """
    runs = find_runs(root, split)
    scored = [run for run in runs if run.scores is not None]
    notes = [f"{run.name}: {run.status}" for run in runs if run.scores is None]
    comparable.measure(scored, split)
    if not mixed:
        comparable.refuse(comparable.conflicts(scored))
    _name_roots(scored)
    # The best checkpoint depends on how often one is looked for.
    ignored = (OPERATIONAL - {"eval_every"} if split else OPERATIONAL) | {"seed"}

    rows: dict[tuple[str, str], Row] = {}
    for run, group in zip(scored, comparable.number_groups(scored), strict=True):
        fixed = {path: value for path, value in run.fields.items() if path not in ignored}
        row = rows.setdefault((group, json.dumps(fixed, sort_keys=True)), Row([], [], group=group))
        seed = run.fields.get("seed")
        twin = next((other for other in row.runs if other.fields.get("seed") == seed), None)
        if twin is None:
            row.runs.append(run)
        else:  # not an independent sample: it would narrow the interval
            notes.append(f"{run.name}: left out, it repeats the config and seed of {twin.name}")

    configs = [row.runs[0].fields for row in rows.values()]
    differing = [path for path in differing_fields(configs) if path not in ignored]
    ordered = sorted(
        rows.values(),
        key=lambda row: (
            [order(int(row.group or 0))] + [order(row.runs[0].fields.get(p)) for p in differing]
        ),
    )
    metrics = _columns([run for row in ordered for run in row.runs], per_class)
    for row in ordered:
        group = [row.group] if row.group else []
        row.label = group + [text(row.runs[0].fields.get(path, ABSENT)) for path in differing]
        row.metrics = metrics
    fields = ["data", *differing] if ordered and ordered[0].group else differing
    if len(ordered) == 1:  # one configuration: named by its folder
        (row,) = ordered
        row.label = [text(root.resolve().name if len(row.runs) > 1 else row.runs[0].name)]
    fields = fields or ["run"]
    if ordered:
        _test(ordered, find_row(fields, ordered, baseline) if baseline else ordered[0])
    return visible(fields), ordered, notes


def find_row(fields: Sequence[str], rows: Sequence[Row], wanted: str) -> Row:
    """The row of FIELD=VALUE,..., as the table shows them; ValueError if it is not exactly one.

    The last words of a field's path will do: upsampling=bilinear.
    """
    # Values may have commas themselves: "model.skips=16, 8,loss=dice".
    parts = [part.partition("=") for part in re.split(r",\s*(?=[\w.]+=)", wanted)]

    def has(row: Row, name: str, value: str) -> bool:
        return any(
            f".{field}".endswith(f".{name.strip()}")
            and "".join(label.split()) == "".join(value.split())
            for field, label in zip(fields, row.label, strict=True)
        )

    found = [row for row in rows if all(has(row, name, value) for name, _, value in parts)]
    if len(found) != 1:
        listed = "\n".join(f"  {spelled(fields, row)}" for row in rows)
        raise ValueError(
            f"--baseline={wanted} must be one row, but is {len(found)} of these:\n{listed}"
        )
    return found[0]


def spelled(fields: Sequence[str], row: Row) -> str:
    """A row in words, as `find_row` reads them."""
    return ",".join(f"{field}={label}" for field, label in zip(fields, row.label, strict=True))


def order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, tuples by length, then names by the alphabet."""
    if isinstance(value, int | float):
        return 0, float(value), ""
    return (1, float(len(value)), str(value)) if isinstance(value, list) else (2, 0.0, str(value))


def text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(text, value)) or "none"
    return "none" if value is None else visible(str(value))


def visible(value: Any) -> Any:
    """Spells out characters that would hide or reorder others, in whatever holds texts."""
    if isinstance(value, dict):
        return {visible(key): visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [visible(item) for item in value]
    if not isinstance(value, str):
        return value
    return _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", value)


def _name_roots(runs: Sequence[Run]) -> None:
    """Makes data.root say which data it was: the same data may lie elsewhere on another machine.

    None, unless there are several under one name and split: then the folder that the data lay in
    for the first of the runs, with what tells it apart.
    """

    def names(run: Run) -> tuple[str, str]:
        return text(run.fields.get("data.name")), text(run.fields.get("data.train_split"))

    found: dict[tuple[str, str], dict[str, str]] = {}
    for run in runs:
        roots = found.setdefault(names(run), {})
        roots.setdefault(run.training_data, text(run.fields.get("data.root")))
    for run in runs:
        roots = found[names(run)]
        data = run.training_data
        run.fields["data.root"] = f"{roots[data]} ({data})" if len(roots) > 1 else None


def _columns(runs: Sequence[Run], per_class: bool) -> dict[str, str]:
    paths = list(dict.fromkeys(path for run in runs for path in run.scores or {}))
    columns = METRICS | {path: name for path, name in BOUNDARY_METRICS.items() if path in paths}
    if per_class:
        prefix = "eval/iou/"
        columns |= {p: f"IoU {p.removeprefix(prefix)}" for p in paths if p.startswith(prefix)}
    return columns


def _test(rows: Sequence[Row], baseline: Row) -> None:
    """Sets p-values of all rows that are comparable with the baseline, Holm-corrected by metric."""
    baseline.is_baseline = True
    others = [row for row in rows if row is not baseline and row.group == baseline.group]
    for metric in baseline.metrics:
        theirs, p_values = baseline.of_seeds(metric), []
        for row in others:
            own = row.of_seeds(metric)
            shared = [seed for seed in own if seed in theirs]
            p_values.append(
                statistics.paired_p_value([own[s] for s in shared], [theirs[s] for s in shared])
            )
        for row, p_value in zip(others, statistics.holm(p_values), strict=True):
            row.p_values[metric] = p_value
