"""The table of a report as Markdown, LaTeX (booktabs) and CSV. In each, any name is only a name."""

import csv
import io
import math
import re
from collections.abc import Sequence

import numpy as np

from dense_jax.report.runs import ABSENT, METRICS, NOTE, Row


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
