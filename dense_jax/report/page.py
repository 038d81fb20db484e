"""The page of a report: one HTML file that needs no network and no other file."""

import math
from collections.abc import Sequence
from typing import Any

import jinja2

from dense_jax.report.runs import NOTE, Row
from dense_jax.report.tables import table

# Okabe and Ito's colours, for colour-blind readers too; after eight rows come dashes.
COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f"
DASHES = "none", "7 3", "2 3"


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


def to_html(title: str, fields: Sequence[str], rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The page; jinja2 escapes every name."""
    head, *body = table(fields, rows)
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("dense_jax", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("page.html.jinja")
    return page.render(
        title=title, head=head, body=body, names=len(fields), note=NOTE, notes=notes,
        plot=plot(rows), colours=COLOURS, dashes=DASHES,
    )  # fmt: skip
