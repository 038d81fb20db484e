"""Groups the runs of a folder into the rows of a report."""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dense_jax.metrics import METRICS
from dense_jax.report import comparable, over_images, statistics
from dense_jax.report.reading import OPERATIONAL, REPEATED, RunFolder, find_runs, number
from dense_jax.spelling import suggestion
from dense_jax.workdir import files

FOLDS_NOTE = (
    "Where there are folds, means, intervals and tests are over the folds instead of the seeds, "
    "and a fold's score is the mean over its seeds. Folds share training images, so their scores "
    "are not independent: intervals tend to be too narrow, and p too small (Bengio and Grandvalet "
    "2004)."
)
ABSENT = "–"
MINUS = "\N{MINUS SIGN}"
# Matches control characters except tab and newline, text direction controls, and surrogates.
_INVISIBLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Column(NamedTuple):
    """A column of scores in the table."""

    path: str  # the key in result.json or evaluation_SPLIT.json
    label: str
    higher_is_better: bool
    unit: str = ""  # see Metric.unit

    @property
    def name(self) -> str:
        """Returns the name of the score in --columns."""
        return self.path.removeprefix("eval/").removeprefix("mean_over_images/")


class Style(NamedTuple):
    """How the tables write scores and names. Scores in CSV files are fractions with all digits."""

    digits: int = 3  # after the decimal point
    percent: bool = False
    names: Mapping[str, str] = {}  # {name: new name}

    def heading(self, label: str, unit: str = "", percent: str = "%") -> str:
        """Returns the heading of a column of scores, with the unit of its numbers.

        percent: The unit of percentages, "%", or "points" for their differences.
        """
        unit = unit or (percent if self.percent else "")
        return f"{label} ({unit})" if unit else label

    def score(self, value: float, unit: str = "", *, sign: str = "-") -> str:
        """Formats a score. If `sign` is "+", positive numbers have a sign, too."""
        if math.isnan(value):
            return ABSENT
        scaled = 100 * value if self.percent and not unit else value
        return f"{scaled:{sign}z.{self.digits}f}".replace("-", MINUS)


@dataclasses.dataclass
class Row:
    """The runs of one configuration, with one run per seed, or per seed and fold."""

    runs: list[RunFolder]
    label: list[str]  # the value of each of Report.fields
    group: str = ""  # see comparable.number_groups
    is_baseline: bool = False
    # Mean differences from the baseline over the shared seeds, by Column.path, and the corrected
    # p-values. NaN if there are too few shared seeds. Empty for rows that are not compared.
    differences: dict[str, float] = dataclasses.field(default_factory=dict)
    p_values: dict[str, float] = dataclasses.field(default_factory=dict)
    # The comparison with the baseline over images. None for rows that are not compared with it.
    image_test: over_images.ImageTest | None = None

    @property
    def name(self) -> str:
        """Returns the row's label as a single string."""
        return ", ".join(self.label)

    def score(self, path: str) -> tuple[float, float]:
        """Returns (mean over seeds or folds, half width of its interval) of a score; see `interval`.

        Both are NaN if any run lacks the score.
        """
        return statistics.interval(list(self.unit_scores(path).values()))

    def unit_scores(self, path: str) -> dict[str, float]:
        """Returns {RunFolder.unit: score}: that of each seed, or of each fold as a mean over seeds.

        A score is NaN if a run lacks it.
        """
        values: dict[str, list[float]] = {}
        for run in self.runs:
            values.setdefault(run.unit, []).append(number(run.scores, path))
        return {unit: float(np.mean(scores)) for unit, scores in values.items()}

    @property
    def num_units(self) -> int:
        """Returns the number of seeds or folds."""
        return len({run.unit for run in self.runs})

    @property
    def below_baseline(self) -> list[str]:
        """Returns the classes whose IoU is below a baseline's in the run of any seed."""
        return list(dict.fromkeys(name for run in self.runs for name in run.below_baseline))

    @property
    def parameters(self) -> int | None:
        """Returns the number of model parameters, or None if unknown or different between runs."""
        counts = {number(run.result, "num_parameters") for run in self.runs}
        count = counts.pop()
        return None if counts or math.isnan(count) else int(count)

    def cost(self, key: str) -> float:
        """Returns the mean of a cost over the seeds that recorded this cost, or NaN if none did."""
        values = [number(run.cost, key) for run in self.runs]
        stated = [value for value in values if not math.isnan(value)]
        return float(np.mean(stated)) if stated else math.nan


class Report(NamedTuple):
    """The contents of a report, for all output formats."""

    fields: list[str]  # config fields in which the rows differ
    rows: list[Row]
    notes: list[str]  # which runs are in no row, and why
    columns: list[Column]
    style: Style = Style()

    @property
    def units(self) -> str:
        """Returns what the intervals are over: "seeds", "folds", or "folds or seeds"."""
        runs = [run for row in self.rows for run in row.runs]
        return " or ".join(sorted({"seeds" if run.fold is None else "folds" for run in runs}))


def build(
    root: pathlib.Path,
    split: str | None = None,
    *,
    per_class: bool = False,
    baseline: str | None = None,
    mixed: bool = False,
    columns: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    digits: int | None = None,
    percent: bool = False,
) -> Report:
    """Builds a report on the runs at or below `root`. The options are the flags of the command.

    Raises ValueError if there are no runs, if the runs are not comparable (unless `mixed`), if
    `baseline` does not match exactly one row, or if `columns` or `names` has an unknown name.
    """
    runs = find_runs(root, split)
    scored = [run for run in runs if run.scores]
    notes = [f"{run.name}: {run.status}" for run in runs if not run.scores]
    comparable.measure(scored, split)
    if not mixed:
        comparable.refuse(comparable.conflicts(scored))
    _name_roots(scored)
    # eval_every matters with `split`, because evaluations may use the best checkpoint.
    ignored = (OPERATIONAL - {"eval_every"} if split else OPERATIONAL) | REPEATED
    rows, repeated = _group(scored, ignored)
    notes += repeated

    configs = [row.runs[0].fields for row in rows]
    fields = [path for path in files.differing_fields(configs) if path not in ignored]
    rows.sort(
        key=lambda row: [
            int(row.group or 0),
            min(run.place for run in row.runs),
            *(order(row.runs[0].fields.get(path)) for path in fields),
        ]
    )
    for row in rows:
        label = [text(row.runs[0].fields.get(path, ABSENT)) for path in fields]
        row.label = [row.group, *label] if row.group else label
    if rows and rows[0].group:
        fields = ["data", *fields]
    if len(rows) == 1:  # a single row is named after its folder
        (row,) = rows
        row.label = [text(root.resolve().name if len(row.runs) > 1 else row.runs[0].name)]
    shown = _columns(scored, columns, per_class)
    report = Report(visible(fields or ["run"]), rows, notes, shown)
    if rows:
        reference = find_row(report.fields, rows, baseline) if baseline else rows[0]
        _test(rows, reference, shown, with_images=split is not None)
    if digits is None:
        digits = 1 if percent else 3
    return _renamed(report, Style(digits, percent, _parse_names(names or ())))


def _group(runs: Sequence[RunFolder], ignored: set[str]) -> tuple[list[Row], list[str]]:
    """Returns one row per configuration, and a note for each run left out as a duplicate."""
    rows: dict[tuple[str, str], Row] = {}
    notes = []
    for run, group in zip(runs, comparable.number_groups(runs), strict=True):
        fixed = {path: value for path, value in run.fields.items() if path not in ignored}
        row = rows.setdefault((group, json.dumps(fixed, sort_keys=True)), Row([], [], group))
        seed, fold = run.fields.get("seed"), run.fold
        twin = next((r for r in row.runs if (r.fields.get("seed"), r.fold) == (seed, fold)), None)
        if twin is None:
            row.runs.append(run)
        else:  # counting the seed twice would narrow the interval
            notes.append(f"{run.name}: left out, it repeats the config and seed of {twin.name}")
    return list(rows.values()), notes


def find_row(fields: Sequence[str], rows: Sequence[Row], wanted: str) -> Row:
    """Returns the row that matches `wanted`, such as "upsampling=bilinear,loss=dice".

    Values are written as in the table. The first components of a field's path may be omitted.
    Raises ValueError unless exactly one row matches.
    """
    # Values may contain commas, as in "model.skips=16, 8,loss=tversky(alpha=0.3, beta=0.7)".
    # A comma is inside parentheses if a ")" without a "(" follows.
    comma = r",\s*(?=[\w.]+=)(?!(?:[^()]|\([^()]*\))*\))"
    parts = [part.partition("=") for part in re.split(comma, wanted)]

    def has(row: Row, name: str, value: str) -> bool:
        return any(
            f".{field}".endswith(f".{name.strip()}")
            and "".join(label.split()) == "".join(value.split())
            for field, label in zip(fields, row.label, strict=True)
        )

    fitting = [row for row in rows if all(has(row, name, value) for name, _, value in parts)]
    if len(fitting) != 1:
        listed = "\n".join(f"  {spelled(fields, row)}" for row in rows)
        raise ValueError(
            f"--baseline={wanted} must be one row, but is {len(fitting)} of these:\n{listed}"
        )
    return fitting[0]


def spelled(fields: Sequence[str], row: Row) -> str:
    """Formats a row as FIELD=VALUE,FIELD=VALUE,..., which `find_row` accepts."""
    return ",".join(f"{field}={label}" for field, label in zip(fields, row.label, strict=True))


def order(value: Any) -> tuple[int, float, str]:
    """Returns a key that sorts numbers first, then lists by length, then other values as text."""
    if isinstance(value, int | float):
        return 0, float(value), ""
    return (1, float(len(value)), str(value)) if isinstance(value, list) else (2, 0.0, str(value))


def text(value: Any) -> str:
    """Formats a field's value for a table."""
    if isinstance(value, list):
        return ", ".join(map(text, value)) or "none"
    return "none" if value is None else visible(str(value))


def visible(value: Any) -> Any:
    """Escapes control and text-direction characters in a string or in nested containers."""
    if isinstance(value, dict):
        return {visible(key): visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [visible(item) for item in value]
    if not isinstance(value, str):
        return value
    return _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", value)


def _name_roots(runs: Sequence[RunFolder]) -> None:
    """Sets each run's data.root to None, because for the same data it differs between machines.

    Where runs with the same data.name and training split used different data, it becomes
    "PATH (FINGERPRINT)" instead. PATH is the data.root of the first run with that fingerprint.
    """

    def name(run: RunFolder) -> tuple[str, str]:
        return text(run.fields.get("data.name")), text(run.fields.get("data.train_split"))

    roots: dict[tuple[str, str], dict[str, str]] = {}
    for run in runs:
        same_name = roots.setdefault(name(run), {})
        same_name.setdefault(run.training_data, text(run.fields.get("data.root")))
    for run in runs:
        same_name, data = roots[name(run)], run.training_data
        run.fields["data.root"] = f"{same_name[data]} ({data})" if len(same_name) > 1 else None


def _columns(
    runs: Sequence[RunFolder], chosen: Sequence[str] | None, per_class: bool
) -> list[Column]:
    """Returns the table's columns: the chosen scores, or the means that METRICS reports.

    By default, boundary and object scores are included if any run has them.
    """
    paths = list(dict.fromkeys(path for run in runs for path in run.scores))
    offered: dict[str, Column] = {}
    usual = []
    for metric in METRICS.values():
        how = metric.higher_is_better, metric.unit
        path = f"eval/{'mean_over_images/' if metric.image_mean else ''}{metric.score}"
        if metric.averaged and (metric.kind == "region" or path in paths):
            offered[metric.score] = Column(path, metric.score_label, *how)
            usual += [metric.score] if metric.reported else []
        prefix = f"eval/{metric.name}/"
        for path in paths:
            if path.startswith(prefix):
                label = f"{metric.label} {path.removeprefix(prefix)}"
                offered[path.removeprefix("eval/")] = Column(path, label, *how)
    for name in chosen or ():
        if name not in offered:
            means = ", ".join(other for other in offered if "/" not in other)
            raise ValueError(
                f"--columns: the runs have no score {name!r} among {means} and those of single "
                f"classes, METRIC/CLASS{suggestion(name, offered)}"
            )
    classes = [name for name in offered if name.startswith("iou/")] if per_class else []
    return [offered[name] for name in dict.fromkeys([*(chosen or usual), *classes])]


def _test(
    rows: Sequence[Row], baseline: Row, columns: Sequence[Column], *, with_images: bool
) -> None:
    """Tests the other rows of the baseline's group against the baseline.

    Sets `Row.differences` and `Row.p_values`. In each column, Holm's method corrects the p-values
    for the number of tested rows.

    with_images: Whether to test over images, too, which sets `Row.image_test`.
    """
    baseline.is_baseline = True
    others = [row for row in rows if row is not baseline and row.group == baseline.group]
    for path, *_ in columns:
        theirs, p_values = baseline.unit_scores(path), []
        for row in others:
            ours = row.unit_scores(path)
            both = [u for u in ours if not math.isnan(ours[u] + theirs.get(u, math.nan))]
            pairs = [ours[unit] for unit in both], [theirs[unit] for unit in both]
            row.differences[path] = float(np.mean(np.subtract(*pairs))) if both else math.nan
            p_values.append(statistics.paired_p_value(*pairs))
        for row, p_value in zip(others, statistics.holm(p_values), strict=True):
            row.p_values[path] = p_value
    if with_images:
        tests = over_images.compare(baseline.runs, [row.runs for row in others])
        for row, test in zip(others, tests, strict=True):
            row.image_test = test


def _parse_names(names: Sequence[str]) -> dict[str, str]:
    """Returns {old: new} of names OLD=NEW. Raises ValueError if a name lacks the "="."""
    if wrong := [name for name in names if "=" not in name]:
        raise ValueError(f"--names: {wrong[0]!r} is not OLD=NEW")
    parts = [name.partition("=") for name in names]
    return {old.strip(): new.strip() for old, _, new in parts}


def _renamed(report: Report, style: Style) -> Report:
    """Returns the report in this style, with new names for fields, their values, and columns.

    Raises ValueError if an old name is not in the table.
    """
    names = style.names
    ends = {field: field.rpartition(".")[2] for field in report.fields}
    known = [*ends, *ends.values(), *(column.name for column in report.columns)]
    known += [name for row in report.rows for name in (*row.label, row.runs[0].scored_dataset)]
    for name in names:
        if name not in known:
            raise ValueError(f"--names: the table has no {name!r}{suggestion(name, known)}")
    for row in report.rows:
        row.label = [names.get(label, label) for label in row.label]
    fields = [names.get(field, names.get(end, field)) for field, end in ends.items()]
    columns = [c._replace(label=names.get(c.name, c.label)) for c in report.columns]
    return report._replace(fields=fields, columns=columns, style=style)
