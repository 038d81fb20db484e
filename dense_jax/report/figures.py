"""Draws the figures for a paper, as PNG and PDF, one column (3.3 inches) wide.

The figures, each drawn only if its data exists:

by_FIELD        mean IoU for each value of FIELD, a config field in which the rows differ
boundary_f1     boundary F1, averaged over classes, against mean IoU
flops           mean IoU against the FLOPs of the forward pass per image
band_width      mean IoU near label boundaries, against the maximum distance to them
error_by_phase  error rate by pixel position (y mod 16, x mod 16)

Each point is the mean over a row's seeds. Numbers in the figures are the report's row numbers.
Error bars are 95% t-intervals or, for two seeds, end at the two scores. The figures by_FIELD and
flops show the mean IoU from the report's table. All other figures use `dense_jax.evaluate` scores.
"""

import logging
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dense_jax.class_colors import LINE_COLORS
from dense_jax.metrics import METRICS, boundary
from dense_jax.report.reading import number
from dense_jax.report.rows import Report, Row
from dense_jax.report.statistics import interval
from dense_jax.workdir.curve import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]  # pairs (mean, half width of the interval); NaN if missing

WIDTH = 3.3  # inches
MARKERS = "os^Dv"  # the marker changes each time the colors repeat
IOU = "eval/mean_iou"
IOU_LABEL = METRICS["iou"].score_label


def write(folder: pathlib.Path, report: Report) -> list[pathlib.Path]:
    """Writes the figures to `folder`. The same report data always gives byte-identical files."""
    from matplotlib import rc_context

    for name in ("fontTools", "matplotlib"):  # these libraries log every font
        logging.getLogger(name).setLevel(logging.WARNING)
    paths = []
    with rc_context(fname=STYLE):
        for name, figure in draw(report):
            folder.mkdir(parents=True, exist_ok=True)
            for ending, dates in (("png", {}), ("pdf", {"CreationDate": None})):
                paths.append(folder / f"{name}.{ending}")
                figure.savefig(paths[-1], dpi=300, metadata=dates)
    return paths


def draw(report: Report) -> Iterator[tuple[str, "Figure"]]:
    """Yields (name, figure) for each figure whose data exists."""
    from matplotlib import ticker

    rows = report.rows
    for i, field in enumerate(report.fields):
        if len({row.label[i] for row in rows}) > 1:
            yield f"by_{re.sub(r'[^A-Za-z0-9.-]', '_', field)}", by_field(report, i)
    f1 = METRICS["boundary_f1"]
    f1s = [evaluated(row, f"eval/{f1.score}") for row in rows]
    if _exist(f1s):
        figure, axes = scatter(rows, [evaluated(row, IOU) for row in rows], f1s)
        axes.set(xlabel=IOU_LABEL, ylabel=f"{f1.label}, mean over classes")
        axes.set_xlim(_clip(*axes.get_xlim()))
        yield "boundary_f1", figure
    flops = [interval([number(run.cost, "flops_per_image") for run in row.runs]) for row in rows]
    if _exist(flops):
        figure, axes = scatter(rows, flops, [row.score(IOU) for row in rows])
        axes.set(xscale="log", xlabel="FLOPs per image", ylabel=IOU_LABEL)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        # Write 1 G instead of 10^9, which would need math text.
        axes.xaxis.set_major_formatter(ticker.EngFormatter())
        axes.minorticks_off()
        yield "flops", figure
    bands = [
        [evaluated(row, f"eval/trimap_mean_iou/{width}") for width in boundary.BAND_WIDTHS]
        for row in rows
    ]
    if any(map(_exist, bands)):
        yield "band_width", by_band_width(rows, bands)
    phases = {i: rates for i, row in enumerate(rows) if (rates := error_rates(row)) is not None}
    if phases:
        yield "error_by_phase", by_phase(rows, phases)


def evaluated(row: Row, path: str) -> tuple[float, float]:
    """Returns (mean, half width of the interval) of an evaluation score, or NaNs if it is missing."""
    values = [number(run.evaluation, path) for run in row.runs if run.evaluation]
    return interval(values) if values else (math.nan, math.nan)


def _exist(points: Points) -> bool:
    return not all(math.isnan(mean) for mean, _ in points)


def by_field(report: Report, i: int) -> "Figure":
    """Draws the mean IoU, with one group of points for each value of `report.fields[i]`.

    Of the other fields in `report.fields`, the first sets the color. Each combination of the
    rest gets a panel.
    """
    rows, others = report.rows, [k for k in range(len(report.fields)) if k != i]

    def text(row: Row, chosen: Sequence[int]) -> str:
        return ", ".join(f"{report.fields[k]}: {row.label[k]}" for k in chosen)

    keys = [(text(row, others[1:]), text(row, others[:1])) for row in rows]  # panel, series
    values = list(dict.fromkeys(row.label[i] for row in rows))
    panels, series = (list(dict.fromkeys(names)) for names in zip(*keys, strict=True))
    figure, grid = _figure(len(panels), 1.6 if others[1:] else 2.0)
    for axes, panel in zip(grid, panels, strict=True):
        axes.set(title=panel, ylabel=IOU_LABEL)
        axes.title.set_fontsize(7)
        axes.grid(axis="x", visible=False)
        for k, name in enumerate(series):
            chosen = [row for row, key in zip(rows, keys, strict=True) if key == (panel, name)]
            # The series are side by side within a group of width 0.6.
            shift = 0.6 * ((k + 0.5) / len(series) - 0.5)
            x = [values.index(row.label[i]) + shift for row in chosen]
            _points(axes, x, [row.score(IOU) for row in chosen], k, name)
    grid[-1].set_xticks(range(len(values)), values)
    if max(map(len, values)) * len(values) > 45:
        for label in grid[-1].get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
    grid[-1].set(xlabel=report.fields[i], xlim=(-0.5, len(values) - 0.5))
    _finish(figure, legend=bool(others))
    return figure


def scatter(rows: Sequence[Row], x: Points, y: Points) -> tuple["Figure", "Axes"]:
    """Draws one numbered point with error bars per row. Skips rows whose x or y is missing."""
    figure, (axes,) = _figure(1, 2.2)
    for i, row in enumerate(rows):
        (x_mean, x_half), (y_mean, _) = x[i], y[i]
        if not math.isnan(x_mean + y_mean):
            _points(axes, [x_mean], [y[i]], i, f"{i + 1}: {row.name}", x_half=x_half)
            axes.annotate(
                str(i + 1), (x_mean, y_mean), (3, 3), textcoords="offset points", fontsize=7
            )
    _finish(figure)
    return figure, axes


def by_band_width(rows: Sequence[Row], bands: Sequence[Points]) -> "Figure":
    """Plots each row's mean IoU near label boundaries, against the maximum distance to them."""
    figure, (axes,) = _figure(1, 2.2)
    axes.set(xscale="log", xlabel="distance to a boundary less than (pixels)", ylabel=IOU_LABEL)
    for i, row in enumerate(rows):
        if _exist(bands[i]):
            # Shift the rows slightly, so that error bars do not overlap.
            shift = 1.12 ** ((2 * i + 1) / len(rows) - 1)
            x = [shift * width for width in boundary.BAND_WIDTHS]
            _points(axes, x, bands[i], i, f"{i + 1}: {row.name}", line="-")
    axes.set_xticks(boundary.BAND_WIDTHS, map(str, boundary.BAND_WIDTHS))
    axes.minorticks_off()
    _finish(figure)
    return figure


def error_rates(row: Row) -> np.ndarray | None:
    """Returns the error rate at each pixel position (y mod 16, x mod 16), [16, 16].

    Returns None if no run was evaluated with --boundaries.
    """
    arrays = [run.array("phase_errors", (16, 16, 2)) for run in row.runs]
    counts = [array.sum(axis=0) for array in arrays if array is not None]
    if not counts:
        return None
    wrong, valid = np.moveaxis(np.sum(counts, axis=0), -1, 0)
    return np.divide(wrong, valid, where=valid > 0, out=np.full(wrong.shape, np.nan))


def by_phase(rows: Sequence[Row], phases: dict[int, np.ndarray]) -> "Figure":
    """Draws each row's error rate at each position (y mod 16, x mod 16), divided by the row's mean.

    A pattern that repeats every s pixels suggests an artifact of upsampling by a factor of s. With
    few images, the image borders and contents can cause patterns, too.
    """
    from matplotlib.figure import Figure

    relative = {i: rates / np.nanmean(rates) for i, rates in phases.items()}
    spread = max(0.01, *(float(np.nanmax(np.abs(rates - 1))) for rates in relative.values()))
    columns = min(3, len(phases))
    height = 0.8 * WIDTH / columns + 0.1 * (len(rows[0].label) + 1)
    num_lines = -(-len(phases) // columns)
    figure = Figure(figsize=(WIDTH, 0.5 + height * num_lines), layout="constrained")
    grid = list(figure.subplots(num_lines, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    for axes, (i, rates) in zip(grid, relative.items(), strict=False):
        axes.imshow(rates, cmap="PuOr_r", vmin=1 - spread, vmax=1 + spread)
        lines = [f"{i + 1}: {rows[i].label[0]}", *rows[i].label[1:], f"{np.nanmean(phases[i]):.3f}"]
        axes.set_title("\n".join(lines), fontsize=6)
    bar = {"location": "bottom", "label": "error rate divided by its mean", "aspect": 30}
    figure.colorbar(grid[0].images[0], ax=figure.axes, **bar)
    return figure


def _figure(num_panels: int, height: float) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.4 + height * num_panels), layout="constrained")
    grid = figure.subplots(num_panels, 1, squeeze=False, sharex=True, sharey=True)
    return figure, list(grid.flat)


def _points(
    axes: "Axes",
    x: Sequence[float],
    y: Points,
    i: int,
    label: str,
    x_half: float = math.nan,
    line: str = "none",
) -> None:
    """Draws means with error bars in the i-th style. A NaN half width draws no error bar."""
    round_, color = divmod(i, len(LINE_COLORS))
    style: dict[str, Any] = {"color": LINE_COLORS[color], "marker": MARKERS[round_ % len(MARKERS)]}
    style |= {"linestyle": line, "capsize": 1.5, "elinewidth": 0.8}
    means, halves = zip(*y, strict=True) if y else ((), ())
    axes.errorbar(x, means, halves, x_half, label=label, **style)


def _clip(low: float, high: float) -> tuple[float, float]:
    """Clips the limits of a score axis to about [0, 1]. Only error bars can extend beyond it."""
    return max(low, -0.03), min(high, 1.03)


def _finish(figure: "Figure", legend: bool = True) -> None:
    """Sets the y limits of all panels. If `legend`, adds a legend below the panels."""
    axes = figure.axes[0]
    axes.set_ylim(_clip(*axes.get_ylim()))
    if not legend:
        return
    series = axes.containers
    labels = [str(container.get_label()) for container in series]
    columns = 2 if max(map(len, labels)) < 26 else 1
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.14 * -(-len(labels) // columns))
    handles = [container[0] for container in series]
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)
