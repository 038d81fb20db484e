"""The tables of a report as Markdown, LaTeX (booktabs) and CSV. In each, a name is only a name."""

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dense_jax.report.manifest import manifest_table, remarks
from dense_jax.report.runs import ABSENT, METRICS, NOTE, Row, text

Table = list[list[tuple[str, bool]]]  # head and body of (text, is it bold)

COSTS = {  # as cost.json has them -> head, what they are divided by, format
    "flops_per_image": ("GFLOPs per image", 1e9, ",.2f"),
    "images_per_second": ("images/s in training", 1, ",.1f"),
    "peak_bytes": ("peak memory, MiB", 2**20, ",.0f"),
}
COST_NOTE = (
    "Costs are means over the seeds. FLOPs are of the forward pass of one image as large as the "
    "training crops; memory is that of one device in training."
)


def table(fields: Sequence[str], rows: Sequence[Row]) -> Table:
    """The scores; bold is the best of a column, among rows that are comparable."""
    metrics = rows[0].metrics if rows else METRICS
    scores = [{metric: row.score(metric) for metric in metrics} for row in rows]
    lines = [[(name, False) for name in (*fields, *metrics.values(), "seeds")]]
    for row, own in zip(rows, scores, strict=True):
        line = [(label, False) for label in row.label]
        rivals = [of for other, of in zip(rows, scores, strict=True) if other.group == row.group]
        for metric, (mean, half) in own.items():
            highest = float(np.fmax.reduce([of[metric][0] for of in rivals], initial=-np.inf))
            shown = ABSENT if math.isnan(mean) else f"{mean:.3f}"
            shown += "" if math.isnan(half) else f" ± {half:.3f}"
            shown += "*" if row.p_value(metric) < 0.05 else ""
            line.append((shown, len(rivals) > 1 and mean == highest))
        lines.append([*line, (str(len(row.runs)), False)])
    return lines


def cost_table(fields: Sequence[str], rows: Sequence[Row]) -> Table:
    """What a run of each row needs. Apart from the scores: timings differ from start to start."""
    heads = [head for head, _, _ in COSTS.values()]
    lines = [[(name, False) for name in (*fields, "parameters", *heads, "devices")]]
    for row in rows:
        cells = [*row.label, ABSENT if row.parameters is None else f"{row.parameters:,}"]
        for key, (_, unit, form) in COSTS.items():
            cost = row.cost(key)
            cells.append(ABSENT if math.isnan(cost) else f"{cost / unit:{form}}")
        lines.append([(cell, False) for cell in (*cells, "; ".join(devices(row)) or ABSENT)])
    return lines


def devices(row: Row) -> list[str]:
    """The kinds that its runs were on, with their number."""
    kinds = (
        (run.environment.get("num_devices"), run.environment.get("device_kind")) for run in row.runs
    )
    return sorted({f"{n} x {text(kind)}" if n else text(kind) for n, kind in kinds if kind})


def markdown(name: str) -> str:
    """Escapes what GitHub would read as markup; snake_case stays readable."""
    name = re.sub(r"([\\`*\[\]<>|~&$])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", name)
    return " ".join(name.split())


def markdown_table(table: Table, num_names: int) -> list[str]:
    """num_names: columns of text, on the left; the others are numbers."""
    head, *body = [
        [f"**{markdown(cell)}**" if bold else markdown(cell) for cell, bold in line]
        for line in table
    ]
    rule = ["---"] * num_names + ["---:"] * (len(head) - num_names)
    return ["| " + " | ".join(line) + " |" for line in (head, rule, *body)]


def to_markdown(fields: Sequence[str], rows: Sequence[Row], notes: Sequence[str]) -> str:
    lines = [*markdown_table(table(fields, rows), len(fields)), "", NOTE]
    lines += [f"\n{markdown(remark)}" for remark in remarks(fields, rows)]
    if notes:  # bold, so that no name can begin a heading or a list
        lines += ["", "Not in the table:", "", *(f"- **{markdown(note)}**" for note in notes)]
    if rows:
        lines += ["", "## Cost", "", *markdown_table(cost_table(fields, rows), len(fields))]
        lines += ["", COST_NOTE, "", "## Manifest", ""]
        shared, differing = manifest_table(fields, rows)
        lines += [*(f"- {markdown(line)}" for line in shared), ""]
        lines += markdown_table(differing, len(differing[0]))
    return "\n".join([*lines, ""])


LATEX = {c: "\\" + c for c in "#$%&_{}"} | {"±": r"$\pm$", "–": "--"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}

_FORMULA = re.compile(r"[=@\t\r]|[+-](?![0-9.]+(e[+-]?[0-9]+)?$)", re.IGNORECASE)


def latex(name: str) -> str:
    name = " ".join("".join(LATEX.get(c, c) for c in name).split())
    return f"{{}}{name}" if name.startswith(("[", "*")) else name  # no option of what is before it


def latex_table(table: Table, num_names: int, comments: Sequence[str]) -> str:
    head, *body = [
        " & ".join(rf"\textbf{{{latex(cell)}}}" if bold else latex(cell) for cell, bold in line)
        for line in table
    ]
    columns = "l" * num_names + "r" * (len(table[0]) - num_names)
    lines = [f"% {' '.join(comment.split())}" for comment in comments]
    lines += [rf"\begin{{tabular}}{{{columns}}}", rf"\toprule {head} \\ \midrule"]
    lines += [rf"{line} \\" for line in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def to_latex(fields: Sequence[str], rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The scores; notes and manifest are comments."""
    comments = [NOTE, *remarks(fields, rows), *notes]
    if rows:
        shared, differing = manifest_table(fields, rows)
        comments += [*shared, *(" | ".join(cell for cell, _ in line) for line in differing)]
    return latex_table(table(fields, rows), len(fields), comments)


def cost_to_latex(fields: Sequence[str], rows: Sequence[Row]) -> str:
    return latex_table(cost_table(fields, rows), len(fields), [COST_NOTE])


def to_csv(fields: Sequence[str], rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Plain numbers at full precision; an empty cell where there is none.

    Of each metric the mean, the half width of its interval, and the corrected p-value against the
    baseline. The same scores make the same text, whenever and wherever they were made.
    """
    metrics = rows[0].metrics if rows else METRICS
    heads = [h for m in metrics for h in (m, f"{m}/half_interval", f"{m}/p_value")]
    lines = [
        [
            *row.label,
            *(_plain(x) for m in metrics for x in (*row.score(m), row.p_value(m))),
            len(row.runs),
        ]
        for row in rows
    ]
    return _csv([*fields, *heads, "num_seeds"], lines)


def cost_to_csv(fields: Sequence[str], rows: Sequence[Row]) -> str:
    """As `to_csv`."""
    lines = [
        [
            *row.label,
            *(
                "" if row.parameters is None else row.parameters,
                *(_plain(row.cost(k)) for k in COSTS),
            ),
            *("; ".join(devices(row)), len(row.runs)),
        ]
        for row in rows
    ]
    return _csv([*fields, "num_parameters", *COSTS, "devices", "num_seeds"], lines)


def _plain(value: float) -> float | str:
    return "" if math.isnan(value) else value


def _csv(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([[_no_formula(cell) for cell in line] for line in (head, *lines)])
    return file.getvalue()


def _no_formula(cell: Any) -> Any:
    """Puts an apostrophe before text that a spreadsheet would compute; a negative number stays one."""
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell
