"""The page of a report: one HTML file that needs no network and no other file."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from dense_jax import storage
from dense_jax.report.manifest import manifest_table, remarks
from dense_jax.report.runs import ABSENT, NOTE, Row, visible
from dense_jax.report.tables import COST_NOTE, cost_table, table

# Okabe and Ito's colors, for color-blind readers too; after eight rows come dashes.
COLORS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f"
DASHES = "none", "7 3", "2 3"
IOU = "eval/iou/"


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers; the first is at or below low, the last at or above high."""
    span = max(high - low, 1e-3)
    power = 10.0 ** math.floor(math.log10(span / 2))
    step = next(power * k for k in (1, 2, 5, 10) if span / (power * k) <= 4)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def curve(row: Row) -> list[tuple[float, float, float, float]]:
    """(step, mean, lowest, highest) over the seeds, of the steps that all of them have."""
    runs = [dict(run.curve) for run in row.runs if run.curve]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    scores = [[run[step] for run in runs] for step in steps]
    return [(s, sum(v) / len(v), min(v), max(v)) for s, v in zip(steps, scores, strict=True)]


def plot(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Learning curves in percent of the plot's width and height; None where there are none."""
    curves = {i: points for i, row in enumerate(rows) if (points := curve(row))}
    points = [point for each in curves.values() for point in each]
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
            "line": [place(step, mean) for step, mean, _, _ in each],
            "band": [place(step, high) for step, _, _, high in each]
            + [place(step, low) for step, _, low, _ in reversed(each)],
        }
        for i, each in curves.items()
    ]
    x_ticks = [(place(x, ys[0])[0], f"{x:,.0f}") for x in xs]
    y_ticks = [(place(0.0, y)[1], f"{y:g}") for y in ys]
    return {"curves": drawn, "x_ticks": x_ticks, "y_ticks": y_ticks}


def bars(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Of each class, a bar per row: IoU and the ends of its interval in percent."""
    finals = [run.final or {} for row in rows for run in row.runs]
    paths = dict.fromkeys(path for final in finals for path in final if path.startswith(IOU))
    found: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        found[path.removeprefix(IOU)] = of_class = []
        for i, row in enumerate(rows):
            mean, half = row.score(path)
            low, high = np.clip([100 * (mean - half), 100 * (mean + half)], 0, 100)
            of_class.append(
                {
                    "row": i,
                    "mean": None if math.isnan(mean) else round(100 * mean, 2),
                    "ends": None if math.isnan(half) else (round(low, 2), round(high, 2)),
                    "text": ABSENT if math.isnan(mean) else f"{mean:.3f}",
                }
            )
    return found


def matrices(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Confusion matrices of the evaluated rows, their seeds' pixels together."""
    found = []
    for i, row in enumerate(rows):
        seeds = [run.evaluation for run in row.runs if run.evaluation]
        if seeds:
            counts = np.sum([seed["confusion_matrix"] for seed in seeds], axis=0)
            label = f"{i + 1}: {', '.join(row.label)}"
            found.append({"label": label, "classes": seeds[0]["class_names"], "counts": counts})
    return found


def to_html(
    title: str,
    fields: Sequence[str],
    rows: Sequence[Row],
    notes: Sequence[str],
    gallery: Mapping[str, Any] | None = None,
) -> str:
    """The page; jinja2 escapes every name.

    gallery: as of `gallery.build`.
    """
    head, *body = table(fields, rows)
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
        "names": len(fields),
        "note": NOTE,
        "notes": notes,
        "about": remarks(fields, rows),
        "cost": cost_table(fields, rows),
        "cost_note": COST_NOTE,
        "manifest": manifest_table(fields, rows) if rows else None,
        "plot": plot(rows),
        "bars": bars(rows),
        "colors": COLORS,
        "dashes": DASHES,
        "data": storage.to_json({"matrices": matrices(rows), "gallery": gallery}),
    }
    return page.render(visible(shown))
