"""Turns a folder of runs into tables: python -m dense_jax.report --workdir=DIR.

Writes DIR/report.html (with learning curves), .md, .csv and .tex. A run is any folder at or below
DIR with a config.json. A row is one configuration, shown by the fields in which the rows differ;
its runs may differ in their seed and in what cannot change a score. A cell is the mean over the
seeds of the final scores, with a 95 % t-interval where there are two or more. A run that did not
finish is never part of a mean: it is named below the table.
"""

import csv
import dataclasses
import io
import json
import math
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
import scipy.stats
from absl import app, flags

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
# Okabe and Ito's colours, for colour-blind readers too; after eight rows come dashes.
COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f"
DASHES = "none", "7 3", "2 3"


@dataclasses.dataclass
class Run:
    name: str
    fields: dict[str, Any]  # dotted path -> value
    final: dict[str, Any] | None  # None: not finished
    status: str
    curve: list[tuple[float, float]]  # (step, mean IoU), in the order of steps


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


def read_run(folder: pathlib.Path, root: pathlib.Path) -> Run:
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
        final = {**result.get("final", {}), "num_parameters": result.get("num_parameters")}
    return Run(name, fields, final, status, curve)


def build(root: pathlib.Path) -> tuple[list[str], list[Row], list[str]]:
    """The fields that differ, the rows in their order, and what a reader must know besides."""
    runs = [read_run(path.parent, root) for path in sorted(root.rglob("config.json"))]
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


def table(fields: Sequence[str], rows: Sequence[Row]) -> list[list[tuple[str, bool]]]:
    """Head and body of (text, is it the best of its column), the same for every format."""
    head = [*fields, *METRICS.values(), "parameters", "seeds"]
    highest = {
        metric: float(np.fmax.reduce([row.score(metric)[0] for row in rows], initial=-np.inf))
        for metric in METRICS
    }
    lines = [[(name, False) for name in head]]
    for row in rows:
        line = [(label, False) for label in row.label]
        for metric in METRICS:
            mean, half = row.score(metric)
            shown = ABSENT if math.isnan(mean) else f"{mean:.3f}"
            shown += "" if math.isnan(half) else f" ± {half:.3f}"
            line.append((shown, len(rows) > 1 and mean == highest[metric]))
        count = ABSENT if row.parameters is None else f"{row.parameters:,}"
        lines.append([*line, (count, False), (str(len(row.runs)), False)])
    return lines


def markdown(name: str) -> str:
    """Escapes what GitHub would read as markup; snake_case stays readable."""
    name = re.sub(r"([\\`*\[\]<>|~&$])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", name)
    return " ".join(name.split())


LATEX = {c: "\\" + c for c in "#$%&_{}"} | {"±": r"$\pm$", "–": "--"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}


def latex(name: str) -> str:
    return " ".join("".join(LATEX.get(c, c) for c in name).split())


def to_markdown(fields: Sequence[str], rows: Sequence[Row], notes: Sequence[str]) -> str:
    head, *body = [
        [f"**{markdown(cell)}**" if best else markdown(cell) for cell, best in line]
        for line in table(fields, rows)
    ]
    rule = ["---"] * len(fields) + ["---:"] * (len(head) - len(fields))
    lines = ["| " + " | ".join(line) + " |" for line in (head, rule, *body)]
    lines += ["", NOTE, *(["", "Not in the table:", ""] if notes else [])]
    # Bold, so that no name can begin a heading or a list.
    return "\n".join([*lines, *(f"- **{markdown(note)}**" for note in notes), ""])


def to_latex(fields: Sequence[str], rows: Sequence[Row], notes: Sequence[str]) -> str:
    head, *body = [
        " & ".join(rf"\textbf{{{latex(cell)}}}" if best else latex(cell) for cell, best in line)
        for line in table(fields, rows)
    ]
    columns = "l" * len(fields) + "r" * (len(METRICS) + 2)
    lines = [f"% {' '.join(note.split())}" for note in [NOTE, *notes]]
    lines += [rf"\begin{{tabular}}{{{columns}}}", rf"\toprule {head} \\ \midrule"]
    lines += [rf"{line} \\" for line in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def to_csv(fields: Sequence[str], rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Plain numbers at full precision; an empty cell where there is none."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    heads = [head for metric in METRICS for head in (metric, f"{metric}/half_interval")]
    writer.writerow([*fields, *heads, "num_parameters", "num_seeds"])
    for row in rows:
        scores = ["" if math.isnan(x) else x for m in METRICS for x in row.score(m)]
        writer.writerow([*row.label, *scores, row.parameters, len(row.runs)])
    return file.getvalue()


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers; the first is at or below low, the last at or above high."""
    span = max(high - low, 1e-3)
    power = 10.0 ** math.floor(math.log10(span / 2))
    step = next(power * k for k in (1, 2, 5, 10) if span / (power * k) <= 4)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def plot(rows: Sequence[Row], width: int = 760, height: int = 300) -> dict[str, Any] | None:
    """Learning curves in SVG coordinates, one per run; None where there are none."""
    points = [point for row in rows for run in row.runs for point in run.curve]
    if not points:
        return None
    steps, scores = zip(*points, strict=True)
    xs, ys = ticks(0.0, max(steps)), ticks(min(scores), max(scores))

    def place(step: float, score: float) -> tuple[float, float]:
        x = 50 + (width - 70) * step / xs[-1]
        return round(x, 1), round(10 + (height - 50) * (ys[-1] - score) / (ys[-1] - ys[0]), 1)

    curves = [
        {"row": index, "name": run.name, "points": [place(*point) for point in run.curve]}
        for index, row in enumerate(rows)
        for run in row.runs
        if run.curve
    ]
    x_ticks = [(place(x, ys[0])[0], f"{x:,.0f}") for x in xs]
    y_ticks = [(place(0.0, y)[1], f"{y:g}") for y in ys]
    size = {"width": width, "height": height}
    return {**size, "curves": curves, "x_ticks": x_ticks, "y_ticks": y_ticks}


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --text: #1c1e21; --soft: #65696f; --line: #d8dade; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6e9; --soft: #9ba1a8; --line: #3a3e44; --page: #16181b }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
       max-width: 75rem; margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin-top: 2.2rem }
p, text { color: var(--soft); fill: var(--soft); font-size: 13px }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line) }
th { vertical-align: bottom; border-bottom: 2px solid var(--soft) }
.name { text-align: left } td:first-child, th:first-child { padding-left: 0 }
svg { display: block; max-width: 100%; height: auto }
td svg { display: inline-block; margin-right: .6rem; vertical-align: middle }
</style>
<h1>{{ title }}</h1>
{% macro pen(row) -%}
fill="none" stroke="{{ colours[row % 8] }}" stroke-width="1.6" stroke-linejoin="round"
stroke-dasharray="{{ dashes[row // 8 % 3] }}"
{%- endmacro %}
<div class="wide"><table>
<thead><tr>{% for cell, _ in head %}
<th{% if loop.index0 < names %} class="name"{% endif %}>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for line in body %}{% set row = loop.index0 %}
<tr>{% for cell, best in line %}<td{% if loop.index0 < names %} class="name"{% endif %}>
{%- if loop.first %}<svg width="24" height="8" aria-hidden="true"><path d="M0 4h24" {{ pen(row) }}/>
</svg>{% endif %}{% if best %}<b>{{ cell }}</b>{% else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>
{%- else %}<tr><td class="name">no finished run yet</td></tr>{% endfor %}</tbody>
</table></div>
<p>{{ note }} The same table as <a href="report.md">Markdown</a>, <a href="report.csv">CSV</a> and
<a href="report.tex">LaTeX</a>.</p>
{% if notes %}<h2>Not in the table</h2>
<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
{% if plot %}<h2>Mean IoU on the evaluation split, by optimizer step; one line per seed</h2>
<svg viewBox="0 0 {{ plot.width }} {{ plot.height }}" width="{{ plot.width }}" role="img"
 aria-label="Learning curves of mean IoU">
{% for y, label in plot.y_ticks %}<path d="M50 {{ y }}H{{ plot.width - 20 }}" stroke="var(--line)"/>
<text x="44" y="{{ y + 4 }}" text-anchor="end">{{ label }}</text>{% endfor %}
{% for x, label in plot.x_ticks %}
<text x="{{ x }}" y="{{ plot.height - 20 }}" text-anchor="middle">{{ label }}</text>{% endfor %}
{% for curve in plot.curves %}<g><title>{{ curve.name }}</title>
<polyline points="{% for x, y in curve.points %}{{ x }},{{ y }} {% endfor %}" {{ pen(curve.row) }}/>
<circle cx="{{ curve.points[-1][0] }}" cy="{{ curve.points[-1][1] }}" r="3"
 fill="{{ colours[curve.row % 8] }}"/></g>{% endfor %}
</svg>{% endif %}
</html>
"""


def to_html(title: str, fields: Sequence[str], rows: Sequence[Row], notes: Sequence[str]) -> str:
    """One page that needs no network and no other file; jinja2 escapes every name."""
    head, *body = table(fields, rows)
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(PAGE)
    return page.render(
        title=title, head=head, body=body, names=len(fields), note=NOTE, notes=notes,
        plot=plot(rows), colours=COLOURS, dashes=DASHES,
    )  # fmt: skip


def write(root: pathlib.Path) -> list[pathlib.Path]:
    """Writes report.html, .md, .csv and .tex into `root`; ValueError if it holds no run."""
    found = build(root)
    texts = {"html": to_html(f"{root.resolve().name}: results", *found)}
    texts |= {"md": to_markdown(*found), "csv": to_csv(*found), "tex": to_latex(*found)}
    for ending, content in texts.items():
        (root / f"report.{ending}").write_text(content, encoding="utf-8")
    return [root / f"report.{ending}" for ending in texts]


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    root = pathlib.Path(flags.FLAGS.workdir)
    try:
        print("wrote", *write(root))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A folder of runs, or one run.", required=True)
    app.run(main)
