"""Formats a report's tables as Markdown, LaTeX (with booktabs) and CSV."""

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dense_jax.evaluation.tables import escape, markdown_table
from dense_jax.report import manifest
from dense_jax.report.rows import ABSENT, NOTE, Column, Report, Row, text

COSTS = {  # {key in cost.json: (column heading, divisor, number format)}
    "flops_per_image": ("GFLOPs per image", 1e9, ",.2f"),
    "images_per_second": ("images/s in training", 1, ",.1f"),
    "peak_bytes": ("peak memory, MiB", 2**20, ",.0f"),
}
COST_NOTE = (
    "Costs are means over the seeds. FLOPs are for the forward pass on one image of the size "
    "of the training crops; memory is per device in training."
)


class Cell(NamedTuple):
    """A table cell. Markdown, LaTeX and HTML show `text`, and CSV contains the `plain` values."""

    text: str
    is_bold: bool = False
    plain: tuple[Any, ...] | None = None  # if None, the only value is `text`


Table = list[list[Cell]]  # the first list is the header


def score_table(report: Report) -> Table:
    """Returns the score table. Bold marks the best score in a column among comparable rows.

    In CSV, a score has three columns: the mean, the half width of its interval, and the corrected
    p-value against the baseline.
    """
    heads = [
        Cell(label, plain=(path, f"{path}/half_interval", f"{path}/p_value"))
        for path, label, _ in report.columns
    ]
    table = [[*map(Cell, report.fields), *heads, Cell("seeds", plain=("num_seeds",))]]
    for row in report.rows:
        scores = [_score_cell(report, row, column) for column in report.columns]
        seeds = Cell(str(len(row.runs)), plain=(len(row.runs),))
        table.append([*map(Cell, row.label), *scores, seeds])
    return table


def _score_cell(report: Report, row: Row, column: Column) -> Cell:
    (mean, half), p_value = row.score(column.path), row.p_values.get(column.path, math.nan)
    rivals = [other for other in report.rows if other.group == row.group]
    means = np.array([other.score(column.path)[0] for other in rivals])
    best = np.fmax.reduce(means) if column.higher_is_better else np.fmin.reduce(means)
    shown = ABSENT if math.isnan(mean) else f"{mean:.3f}"
    shown += "" if math.isnan(half) else f" ± {half:.3f}"
    shown += "*" if p_value < 0.05 else ""
    below = row.below_baseline
    if column.path in [f"eval/iou/{name}" for name in below] or (
        below and column.path == "eval/mean_iou"
    ):
        shown += manifest.BELOW
    return Cell(shown, len(rivals) > 1 and bool(mean == best), (mean, half, p_value))


def cost_table(report: Report) -> Table:
    """Returns the cost table, which is separate because timings are not reproducible."""
    heads = [Cell(head, plain=(key,)) for key, (head, _, _) in COSTS.items()]
    parameters = Cell("parameters", plain=("num_parameters",))
    devices = Cell("devices", plain=("devices", "num_seeds"))
    table = [[*map(Cell, report.fields), parameters, *heads, devices]]
    for row in report.rows:
        count = row.parameters
        parameters = Cell(ABSENT if count is None else f"{count:,}", plain=(count,))
        costs = []
        for key, (_, divisor, form) in COSTS.items():
            cost = row.cost(key)
            shown = ABSENT if math.isnan(cost) else f"{cost / divisor:{form}}"
            costs.append(Cell(shown, plain=(cost,)))
        kinds = "; ".join(_devices(row))
        devices = Cell(kinds or ABSENT, plain=(kinds, len(row.runs)))
        table.append([*map(Cell, row.label), parameters, *costs, devices])
    return table


def _devices(row: Row) -> list[str]:
    """Returns the distinct devices that the row's runs used, such as "8 x TPU v4"."""
    used = (
        (run.environment.get("num_devices"), run.environment.get("device_kind")) for run in row.runs
    )
    return sorted({f"{n} x {text(kind)}" if n else text(kind) for n, kind in used if kind})


def manifest_table(report: Report) -> tuple[list[str], Table]:
    """Returns the facts that all rows share, and a table of the facts that differ between rows."""
    shared, differing = manifest.columns(report)
    table = [[*map(Cell, report.fields), *map(Cell, differing)]]
    for row, *cells in zip(report.rows, *differing.values(), strict=True):
        table.append([*map(Cell, row.label), *map(Cell, cells)])
    return shared, table


def to_markdown(report: Report) -> str:
    """Returns the contents of report.md."""

    def table(lines: Table, num_names: int = len(report.fields)) -> str:
        shown = [
            [f"**{escape(cell)}**" if is_bold else escape(cell) for cell, is_bold, _ in line]
            for line in lines
        ]
        return markdown_table(shown, num_names)

    parts = [table(score_table(report)), NOTE, *map(escape, manifest.remarks(report))]
    if report.notes:  # bold keeps a name from starting a heading or a list
        listed = "\n".join(f"- **{escape(note)}**" for note in report.notes)
        parts += ["Not in the table:", listed]
    if report.rows:
        shared, differing = manifest_table(report)
        parts += ["## Cost", table(cost_table(report)), COST_NOTE, "## Manifest"]
        parts += ["\n".join(f"- {escape(line)}" for line in shared)]
        parts += [table(differing, len(differing[0]))]
    return "\n\n".join(parts) + "\n"


LATEX = {c: "\\" + c for c in "#$%&_{}"} | {"±": r"$\pm$", "–": "--"}
LATEX |= {
    "†": r"\textdagger{}",
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}


def latex(name: str) -> str:
    """Escapes a name for LaTeX. Puts {} before a leading "[" or "*", which LaTeX could misread."""
    name = " ".join("".join(LATEX.get(c, c) for c in name).split())
    return f"{{}}{name}" if name.startswith(("[", "*")) else name


def latex_table(table: Table, num_names: int, comments: Sequence[str]) -> str:
    """Returns comments and a LaTeX table. The first `num_names` columns are left-aligned text."""
    head, *body = [
        " & ".join(
            rf"\textbf{{{latex(cell)}}}" if is_bold else latex(cell) for cell, is_bold, _ in line
        )
        for line in table
    ]
    columns = "l" * num_names + "r" * (len(table[0]) - num_names)
    lines = [f"% {' '.join(comment.split())}" for comment in comments]
    lines += [rf"\begin{{tabular}}{{{columns}}}", rf"\toprule {head} \\ \midrule"]
    lines += [rf"{line} \\" for line in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def to_latex(report: Report) -> str:
    """Returns the contents of report.tex: the score table, with notes and manifest as comments."""
    comments = [NOTE, *manifest.remarks(report), *report.notes]
    if report.rows:
        shared, differing = manifest_table(report)
        comments += [*shared, *(" | ".join(cell for cell, *_ in line) for line in differing)]
    return latex_table(score_table(report), len(report.fields), comments)


def cost_to_latex(report: Report) -> str:
    """Returns the contents of report_cost.tex: the cost table."""
    return latex_table(cost_table(report), len(report.fields), [COST_NOTE])


_FORMULA = re.compile(r"[=@\t\r]|[+-](?![0-9.]+(e[+-]?[0-9]+)?$)", re.IGNORECASE)


def to_csv(table: Table) -> str:
    """Returns the table as CSV with numbers at full precision. Missing numbers are empty cells."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for line in table:
        cells = [cell.plain or (cell.text,) for cell in line]
        writer.writerow([_plain(value) for values in cells for value in values])
    return file.getvalue()


def _plain(value: Any) -> Any:
    """Formats a CSV value. Puts "'" before text that a spreadsheet would run as a formula."""
    if isinstance(value, str):
        return f"'{value}" if _FORMULA.match(value) else value
    return "" if value is None or math.isnan(value) else value
