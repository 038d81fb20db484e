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
from dense_jax.report.over_images import NUM_DRAWS, ImageTest
from dense_jax.report.rows import ABSENT, MINUS, Column, Report, Row, Style, text

COSTS = {  # {key in cost.json: (column heading, divisor, number format)}
    "flops_per_image": ("GFLOPs per image", 1e9, ",.2f"),
    "images_per_second": ("images/s in training", 1, ",.1f"),
    "peak_bytes": ("peak memory, MiB", 2**20, ",.0f"),
}
COST_NOTE = (
    "Costs are means over the runs. FLOPs are for the forward pass on one image of the size "
    "of the training crops; memory is per device in training."
)
SEED_NOTE = (
    "How the means differ from the baseline's, over the seeds that both rows have. p is the "
    "two-sided p-value of a paired t-test over these seeds, at least two, after Holm's correction "
    "over the rows of the column; * marks p < 0.05."
)
IMAGE_NOTE = (
    "How the mean IoU differs from the baseline's, over all pixels of the split, averaged over the "
    "seeds that both rows have. p is the two-sided p-value of a permutation test that swaps the "
    f"two rows' predictions of random images, {NUM_DRAWS:,} times (in every possible way for few "
    "images), after Holm's correction over the rows; * marks p < 0.05. The 95 % interval is that of "
    f"{NUM_DRAWS:,} bootstrap resamples of the images, the same for both rows, without correction. "
    "The test says whether the difference would hold on other images, given these trained networks. "
    "It does not say whether it would hold for networks trained with other seeds: the test over "
    "seeds does, given these images. Images are treated as independent. Frames of one video or "
    "slices of one volume are not, so that their p is too small and their interval too narrow."
)

SMALLEST_P = 0.00005  # p-values below round to 0.0000


class Cell(NamedTuple):
    """A table cell. Markdown, LaTeX and HTML show `text`, and CSV contains the `plain` values."""

    text: str
    is_bold: bool = False
    plain: tuple[Any, ...] | None = None  # if None, the only value is `text`


Table = list[list[Cell]]  # the first list is the header


def score_table(report: Report) -> Table:
    """Returns the score table. Bold marks the best score in a column among comparable rows.

    In CSV, a score has five columns: the mean, the half width of its 95% t-interval, the scores of
    the seeds, and the difference from the baseline with its corrected p-value.
    """
    kinds = "half_interval", "seeds", "difference", "p_value"
    heads = [
        Cell(
            report.style.heading(label, unit),
            plain=(path, *(f"{path}/{kind}" for kind in kinds)),
        )
        for path, label, _, unit in report.columns
    ]
    units = report.units or "seeds"
    last = Cell(units, plain=(f"num_{units.replace(' ', '_')}",))
    table = [[*map(Cell, report.fields), *heads, last]]
    for row in report.rows:
        scores = [_score_cell(report, row, column) for column in report.columns]
        number = Cell(str(row.num_units), plain=(row.num_units,))
        table.append([*map(Cell, row.label), *scores, number])
    return table


def _score_cell(report: Report, row: Row, column: Column) -> Cell:
    (mean, half), seeds = row.score(column.path), row.unit_scores(column.path).values()
    p_value = row.p_values.get(column.path, math.nan)
    rivals = [other for other in report.rows if other.group == row.group]
    means = np.array([other.score(column.path)[0] for other in rivals])
    best = np.fmax.reduce(means) if column.higher_is_better else np.fmin.reduce(means)
    shown, *others = (report.style.score(x, column.unit) for x in (mean, half, *seeds))
    if not math.isnan(half):
        shown += f" ± {others[0]}" if len(seeds) > 2 else f" ({', '.join(others[1:])})"
    shown += "*" if p_value < 0.05 else ""
    below = row.below_baseline
    if column.path in [f"eval/iou/{name}" for name in below] or (
        below and column.path == "eval/mean_iou"
    ):
        shown += manifest.BELOW
    plain = (
        *(mean, half if len(seeds) > 2 else None, " ".join(map(str, seeds))),
        *(row.differences.get(column.path), p_value),
    )
    return Cell(shown, len(rivals) > 1 and bool(mean == best), plain)


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


def seed_table(report: Report) -> Table:
    """Returns the table of the tests over seeds: one row per row compared with the baseline."""
    headings = (report.style.heading(label, unit, "points") for _, label, _, unit in report.columns)
    table = [[*map(Cell, report.fields), *map(Cell, headings)]]
    for row in report.rows:
        if row.differences:
            cells = [_difference_cell(report, row, column) for column in report.columns]
            table.append([*map(Cell, row.label), *cells])
    return table


def _difference_cell(report: Report, row: Row, column: Column) -> Cell:
    shown = report.style.score(row.differences[column.path], column.unit, sign="+")
    if not math.isnan(p_value := row.p_values[column.path]):
        relation = "" if p_value < SMALLEST_P else "= "
        shown += f" (p {relation}{_p_text(p_value)})"
    return Cell(shown)


def _p_text(p_value: float) -> str:
    """Formats a p-value, with an asterisk if it is significant."""
    shown = "< 0.0001" if p_value < SMALLEST_P else f"{p_value:.4f}"
    return shown + ("*" if p_value < 0.05 else "")


def image_table(report: Report) -> Table:
    """Returns the table of the tests over images: one row per row compared with the baseline."""
    heads = [
        Cell(report.style.heading("difference", "", "points"), plain=("difference",)),
        Cell("95 % interval", plain=("low", "high")),
        Cell("p", plain=("p_value",)),
        Cell("images", plain=("num_images",)),
        Cell("seeds", plain=("num_seeds",)),
    ]
    table = [[*map(Cell, report.fields), *heads]]
    for row in report.rows:
        if (test := row.image_test) is not None:
            table.append([*map(Cell, row.label), *_image_cells(report.style, test)])
    return table


def _image_cells(style: Style, test: ImageTest) -> list[Cell]:
    difference, low, high, p_value, num_images, num_seeds, refusal = test
    shown, *ends = (style.score(value, sign="+") for value in (difference, low, high))
    cells = [
        Cell(shown, plain=(difference,)),
        Cell(" to ".join(ends), plain=(low, high)),
        Cell(_p_text(p_value), plain=(p_value,)),
        Cell(str(num_images), plain=(num_images,)),
        Cell(str(num_seeds), plain=(num_seeds,)),
    ]
    return [cell._replace(text=ABSENT) for cell in cells] if refusal else cells


class Section(NamedTuple):
    """A table beside the score table.

    missing: The rows that are not in the table, and why.
    """

    title: str
    table: Table
    note: str
    missing: Sequence[str] = ()


def sections(report: Report) -> dict[str, Section]:
    """Returns the tables of the tests and costs, by the part of their files' names."""
    tests = [(row.name, row.image_test) for row in report.rows]
    refused = [f"{name}: {test.refusal}" for name, test in tests if test and test.refusal]
    units = report.units or "seeds"
    seed_note = SEED_NOTE.replace("seeds", units)
    return {
        "seeds": Section(f"Tests over {units}", seed_table(report), seed_note),
        "images": Section("Tests over images", image_table(report), IMAGE_NOTE, refused),
        "cost": Section("Cost", cost_table(report), COST_NOTE),
    }


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

    notes = [" ".join(manifest.caption(report)), *manifest.remarks(report)]
    parts = [table(score_table(report)), *map(escape, notes)]
    parts += _listed(report.notes)
    for title, lines, note, missing in sections(report).values():
        if len(lines) > 1:
            parts += [f"## {title}", table(lines), note, *_listed(missing)]
    if report.rows:
        shared, differing = manifest_table(report)
        parts += ["## Manifest", "\n".join(f"- {escape(line)}" for line in shared)]
        parts += [table(differing, len(differing[0]))]
    return "\n\n".join(parts) + "\n"


def _listed(notes: Sequence[str]) -> list[str]:
    """Returns the part of report.md that lists notes on what is missing in the table above it."""
    # Bold keeps a name from starting a heading or a list.
    listed = "\n".join(f"- **{escape(note)}**" for note in notes)
    return ["Not in the table:", listed] if notes else []


LATEX = {c: "\\" + c for c in "#$%&_{}"} | {"±": r"$\pm$", "–": "--", MINUS: "$-$"}
LATEX |= {"†": r"\textdagger{}", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
LATEX |= {"^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}"}
LATEX |= {"|": r"\textbar{}"}
NEEDED = r"Needs \usepackage{booktabs}. The caption: \caption{\protect\input{report_caption}}"


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
    comments = [NEEDED, *manifest.caption(report), *manifest.remarks(report), *report.notes]
    if report.rows:
        shared, differing = manifest_table(report)
        comments += [*shared, *(" | ".join(cell for cell, *_ in line) for line in differing)]
    return latex_table(score_table(report), len(report.fields), comments)


def caption_to_latex(report: Report) -> str:
    """Returns the contents of report_caption.tex: what the score table shows, in sentences."""
    return latex(" ".join(manifest.caption(report))) + "%\n"


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
