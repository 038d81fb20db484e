"""The figures of a paper, as PNG and PDF, one column (3.3 inches) wide; each only if its data exist.

by_FIELD             mean IoU for each value of a config field in which the rows differ
boundary_f1          boundary F1, the mean of the classes' own, over mean IoU
flops                mean IoU over FLOPs of the forward pass per image
band_width           mean IoU of the pixels close to the label's boundaries, over how close
error_by_phase       how the errors depend on the pixel's place in a cell of 16 x 16

A point is a row of the report by its number there, the mean over its seeds; its bars are the 95 %
t-interval, where there are two seeds or more. by_FIELD and flops have the table's mean IoU; the others
are of the evaluated checkpoints.
"""

import logging
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dense_jax.metrics import boundary
from dense_jax.report.page import COLORS
from dense_jax.report.reading import number, read_array
from dense_jax.report.runs import Row
from dense_jax.report.statistics import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.3  # inches
STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType, which journals take
    "text.parse_math": False,  # a name may hold a dollar sign
}
MARKERS = "os^Dv"  # after eight rows, whose colors then repeat


def write(folder: pathlib.Path, fields: Sequence[str], rows: Sequence[Row]) -> list[pathlib.Path]:
    """Writes the figures; the same numbers give the same bytes."""
    from matplotlib import rc_context

    # By which it tells of every step of embedding a font.
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    paths = []
    with rc_context(STYLE):
        for name, figure in draw(fields, rows):
            folder.mkdir(parents=True, exist_ok=True)
            for ending, dates in (("png", {}), ("pdf", {"CreationDate": None})):
                paths.append(folder / f"{name}.{ending}")
                figure.savefig(paths[-1], dpi=300, metadata=dates)
    return paths


def draw(fields: Sequence[str], rows: Sequence[Row]) -> Iterator[tuple[str, "Figure"]]:
    """Name and figure, of each whose data exist."""
    for i, field in enumerate(fields):
        if len({row.label[i] for row in rows}) > 1:
            yield f"by_{re.sub(r'[^A-Za-z0-9.-]', '_', field)}", by_field(fields, rows, i)
    ious = [evaluated(row, "eval/mean_iou") for row in rows]
    f1s = [evaluated(row, "eval/mean_boundary_f1") for row in rows]
    if _any(f1s):
        figure = scatter(rows, ious, f1s)
        axes = figure.axes[0]
        axes.set(
            xlabel="mean IoU", ylabel="boundary F1, mean of classes", xlim=_clip(*axes.get_xlim())
        )
        yield "boundary_f1", figure
    flops = [interval([number(run.cost, "flops_per_image") for run in row.runs]) for row in rows]
    if _any(flops):
        figure = scatter(rows, flops, [row.score("eval/mean_iou") for row in rows])
        axes = figure.axes[0]
        axes.set(xscale="log", xlabel="FLOPs per image", ylabel="mean IoU")
        _decimal(axes)
        yield "flops", figure
    bands = [
        [evaluated(row, f"eval/trimap_mean_iou/{width}") for width in boundary.BAND_WIDTHS]
        for row in rows
    ]
    if any(map(_any, bands)):
        yield "band_width", by_band_width(rows, bands)
    phases = {i: rates for i, row in enumerate(rows) if (rates := error_rates(row)) is not None}
    if phases:
        yield "error_by_phase", by_phase(rows, phases)


def evaluated(row: Row, metric: str) -> tuple[float, float]:
    """Mean and half interval over the seeds that were evaluated; NaN where there is none."""
    values = [number(run.evaluation, metric) for run in row.runs if run.evaluation]
    return interval(values) if values else (math.nan, math.nan)


def _any(points: Sequence[tuple[float, float]]) -> bool:
    return not all(math.isnan(mean) for mean, _ in points)


def by_field(fields: Sequence[str], rows: Sequence[Row], i: int) -> "Figure":
    """A group of points for each value of field i: a color for each value of the first other
    field, and a panel for each combination of the rest.
    """
    others = [k for k in range(len(fields)) if k != i]
    color_by, panel_by = others[:1], others[1:]

    def text(row: Row, which: Sequence[int]) -> str:
        return ", ".join(f"{fields[k]}: {row.label[k]}" for k in which)

    values = list(dict.fromkeys(row.label[i] for row in rows))
    series = list(dict.fromkeys(text(row, color_by) for row in rows))
    panels = list(dict.fromkeys(text(row, panel_by) for row in rows))
    figure, grid = _figure(len(panels), 1.6 if panel_by else 2.0)
    for axes, panel in zip(grid, panels, strict=True):
        axes.set(title=panel, ylabel="mean IoU")
        axes.title.set_fontsize(7)
        axes.grid(axis="x", visible=False)
        for k, name in enumerate(series):
            at = [r for r in rows if (text(r, panel_by), text(r, color_by)) == (panel, name)]
            # Side by side within a group that is 0.6 wide.
            shift = 0.6 * ((k + 0.5) / len(series) - 0.5)
            x = [values.index(row.label[i]) + shift for row in at]
            _points(axes, x, [row.score("eval/mean_iou") for row in at], k, name)
    long = max(map(len, values)) * len(values) > 45
    grid[-1].set_xticks(range(len(values)), values)
    if long:
        for label in grid[-1].get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
    grid[-1].set(xlabel=fields[i], xlim=(-0.5, len(values) - 0.5))
    _finish(figure, legend=bool(color_by))
    return figure


def scatter(
    rows: Sequence[Row], x: Sequence[tuple[float, float]], y: Sequence[tuple[float, float]]
) -> "Figure":
    """A numbered point for each row that has both, with bars both ways."""
    figure, (axes,) = _figure(1, 2.2)
    for i, row in enumerate(rows):
        (x_mean, x_half), (y_mean, y_half) = x[i], y[i]
        if not math.isnan(x_mean + y_mean):
            _points(axes, [x_mean], [(y_mean, y_half)], i, _label(i, row), x_half=x_half)
            axes.annotate(
                str(i + 1), (x_mean, y_mean), (3, 3), textcoords="offset points", fontsize=7
            )
    _finish(figure)
    return figure


def by_band_width(rows: Sequence[Row], bands: Sequence[Sequence[tuple[float, float]]]) -> "Figure":
    """A line for each row, over the distance to the label's boundaries."""
    figure, (axes,) = _figure(1, 2.2)
    axes.set(xscale="log", xlabel="pixels to a boundary, less than", ylabel="mean IoU")
    for i, row in enumerate(rows):
        if _any(bands[i]):
            # A little apart, for bars that would hide each other.
            shift = 1.12 ** ((2 * i + 1) / len(rows) - 1)
            x = [shift * width for width in boundary.BAND_WIDTHS]
            _points(axes, x, bands[i], i, _label(i, row), line="-")
    axes.set_xticks(boundary.BAND_WIDTHS, map(str, boundary.BAND_WIDTHS))
    axes.minorticks_off()
    _finish(figure)
    return figure


def error_rates(row: Row) -> np.ndarray | None:
    """Wrong / valid pixels at each (y mod 16, x mod 16), over all evaluated seeds and images.

    None where none was evaluated with its boundaries, or by a version that did not count phases.
    """
    arrays = [read_array(run, "phase_errors", (16, 16, 2)) for run in row.runs]
    counts = [array.sum(axis=0) for array in arrays if array is not None]
    if not counts:
        return None
    wrong, valid = np.moveaxis(np.sum(counts, axis=0), -1, 0)
    return np.divide(wrong, valid, where=valid > 0, out=np.full(wrong.shape, np.nan))


def by_phase(rows: Sequence[Row], phases: dict[int, np.ndarray]) -> "Figure":
    """A map for each row: the error rate at a phase, relative to the mean over phases.

    1 everywhere: the place of a pixel does not matter. A pattern that repeats every s pixels is an
    artifact of the upsampling by s. The borders of images and what few images show are in it, too.
    """
    from matplotlib.figure import Figure

    relative = {i: rates / np.nanmean(rates) for i, rates in phases.items()}
    spread = max(0.01, *(float(np.nanmax(np.abs(each - 1))) for each in relative.values()))
    columns = min(3, len(phases))
    height = 0.8 * WIDTH / columns + 0.1 * (len(rows[0].label) + 1)
    num_lines = -(-len(phases) // columns)
    figure = Figure(figsize=(WIDTH, 0.5 + height * num_lines), layout="constrained")
    grid = list(figure.subplots(num_lines, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    for axes, (i, each) in zip(grid, relative.items(), strict=False):
        axes.imshow(each, cmap="PuOr_r", vmin=1 - spread, vmax=1 + spread)
        lines = [f"{i + 1}: {rows[i].label[0]}", *rows[i].label[1:], f"{np.nanmean(phases[i]):.3f}"]
        axes.set_title("\n".join(lines), fontsize=6)
    figure.colorbar(
        grid[0].images[0],
        ax=figure.axes,
        location="bottom",
        label="error rate / its mean",
        aspect=30,
    )
    return figure


def _figure(num_panels: int, height: float) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.4 + height * num_panels), layout="constrained")
    return figure, list(
        figure.subplots(num_panels, 1, squeeze=False, sharex=True, sharey=True).flat
    )


def _points(
    axes: "Axes",
    x: Sequence[float],
    y: Sequence[tuple[float, float]],
    i: int,
    label: str,
    x_half: float = math.nan,
    line: str = "none",
) -> None:
    """Means with their intervals, in the look of number i; no bar where there is no interval."""
    style: dict[str, Any] = {"color": COLORS[i % 8], "marker": MARKERS[i // 8 % 5]}
    style |= {"linestyle": line, "capsize": 1.5, "elinewidth": 0.8}
    means, halves = zip(*y, strict=True) if y else ((), ())
    axes.errorbar(x, means, halves, x_half, label=label, **style)  # of NaN: no bar


def _label(i: int, row: Row) -> str:
    return f"{i + 1}: {', '.join(row.label)}"


def _clip(low: float, high: float) -> tuple[float, float]:
    """The limits of an axis of scores: none is beyond 0 and 1, though an interval may be."""
    return max(low, -0.03), min(high, 1.03)


def _finish(figure: "Figure", legend: bool = True) -> None:
    """Limits, and a legend below the figure, which grows by it."""
    axes = figure.axes[0]
    axes.set_ylim(_clip(*axes.get_ylim()))
    if not legend:
        return
    series = axes.containers
    labels = [str(each.get_label()) for each in series]
    columns = 2 if max(map(len, labels)) < 26 else 1
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.14 * -(-len(labels) // columns))
    figure.legend([each[0] for each in series], labels, loc="outside lower left", ncols=columns)


def _decimal(axes: "Axes") -> None:
    """1 G rather than 10^9, which would need mathematical text."""
    from matplotlib.ticker import EngFormatter, LogLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.minorticks_off()
