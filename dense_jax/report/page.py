"""Builds the HTML page of a report as a single file that works offline."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from matplotlib import ticker

from dense_jax import class_colors, storage
from dense_jax.report import manifest, tables
from dense_jax.report.rows import Report, Row, Style, visible

DASHES = "none", "7 3", "2 3"  # stroke patterns; the pattern changes each time the colors repeat
IOU = "eval/iou/"


def ticks(low: float, high: float) -> list[float]:
    """Returns three to six round axis ticks that cover the interval [low, high]."""
    locator = ticker.MaxNLocator(4, steps=[1, 2, 5, 10])
    return [round(float(tick), 10) for tick in locator.tick_values(low, max(high, low + 1e-3))]


def curve(row: Row) -> list[tuple[float, float, float, float]]:
    """Returns a row's learning curve: (step, mean, min, max) of the mean IoU over the runs.

    Includes only the steps that every run with a curve logged.
    """
    runs = [dict(run.curve) for run in row.runs if run.curve]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    scores = [[run[step] for run in runs] for step in steps]
    return [(s, sum(v) / len(v), min(v), max(v)) for s, v in zip(steps, scores, strict=True)]


def plot(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Returns the learning curves and axis ticks, or None if no row has a curve.

    Coordinates are in percent of the plot's size, from the top left corner.
    """
    curves = {i: points for i, row in enumerate(rows) if (points := curve(row))}
    points = [point for points in curves.values() for point in points]
    if not points:
        return None
    xs = ticks(0.0, max(step for step, *_ in points))
    ys = ticks(min(low for *_, low, _ in points), max(high for *_, high in points))

    def place(step: float, score: float) -> tuple[float, float]:
        x, y = step / xs[-1], (ys[-1] - score) / (ys[-1] - ys[0])
        return round(100 * x, 2), round(100 * y, 2)

    drawn = [
        {
            "row": i,
            "line": [place(step, mean) for step, mean, _, _ in points],
            "band": [place(step, high) for step, _, _, high in points]
            + [place(step, low) for step, _, low, _ in reversed(points)],
        }
        for i, points in curves.items()
    ]
    x_ticks = [(place(x, ys[0])[0], f"{x:,.0f}") for x in xs]
    y_ticks = [(place(0.0, y)[1], f"{y:g}") for y in ys]
    return {"curves": drawn, "x_ticks": x_ticks, "y_ticks": y_ticks}


def bars(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Returns {class: one bar per row}, where a bar shows the IoU and its interval in percent."""
    rows, style = report.rows, report.style
    paths = dict.fromkeys(path for row in rows for run in row.runs for path in run.final)
    return {
        path.removeprefix(IOU): [_bar(i, *row.score(path), style) for i, row in enumerate(rows)]
        for path in paths
        if path.startswith(IOU)
    }


def _bar(i: int, mean: float, half: float, style: Style) -> dict[str, Any]:
    low, high = np.clip([100 * (mean - half), 100 * (mean + half)], 0, 100)
    return {
        "row": i,
        "mean": None if math.isnan(mean) else round(100 * mean, 2),
        "ends": None if math.isnan(half) else (round(low, 2), round(high, 2)),
        "text": style.score(mean),
    }


def matrices(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns one confusion matrix, summed over seeds, for each row with an evaluated run.

    Rows of regions have none.
    """
    shown = []
    for i, row in enumerate(rows):
        seeds = [run.evaluation for run in row.runs if run.evaluation]
        if seeds and not seeds[0].get("regions"):
            counts = np.sum([seed["confusion_matrix"] for seed in seeds], axis=0)
            label = f"{i + 1}: {row.name}"
            shown.append({"label": label, "classes": seeds[0]["class_names"], "counts": counts})
    return shown


def to_html(title: str, report: Report, gallery: Mapping[str, Any] | None = None) -> str:
    """Returns the HTML page of a report, with all names escaped.

    gallery: The result of `gallery.build`.
    """
    head, *body = tables.score_table(report)
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("dense_jax", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.jinja")
    shown = {
        "title": title,
        "head": head,
        "body": body,
        "names": len(report.fields),
        "caption": " ".join(manifest.caption(report)),
        "notes": report.notes,
        "about": manifest.remarks(report),
        "sections": {name: s._asdict() for name, s in tables.sections(report).items()},
        "manifest": tables.manifest_table(report) if report.rows else None,
        "plot": plot(report.rows),
        "bars": bars(report),
        "colors": class_colors.LINE_COLORS,
        "dashes": DASHES,
        "data": storage.to_json({"matrices": matrices(report.rows), "gallery": gallery}),
    }
    return page.render(visible(shown))
