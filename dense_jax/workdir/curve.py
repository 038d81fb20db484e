"""Draws the learning curve of a run: its losses and its mean IoU by step. Never imports JAX."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from dense_jax.class_colors import LINE_COLORS
from dense_jax.storage import atomic
from dense_jax.workdir import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("figures.mplstyle")  # the report's figures have it, too
INCHES = 6.4, 4.8
DPI = 150


def draw(workdir: epath.Path) -> epath.Path:
    """Draws learning_curve.png from all of metrics.jsonl. Returns the path of the picture."""
    from matplotlib import rc_context  # slow to import, so not at the start of a training

    path = workdir / "learning_curve.png"
    with rc_context(fname=STYLE), atomic(path) as file:
        figure(files.read_records(workdir / "metrics.jsonl")).savefig(file, format="png", dpi=DPI)
    return path


def figure(records: list[dict[str, Any]]) -> "Figure":
    """Plots the losses above the mean IoU. A training loss is that of a single batch."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=INCHES, layout="constrained")
    losses, scores = drawn.subplots(2, 1, sharex=True)
    _plot(losses, records, "train/loss", "training, single batches", LINE_COLORS[0])
    _plot(losses, records, "eval/loss", "evaluation", LINE_COLORS[1], marker="o")
    _plot(scores, records, "eval/mean_iou", "evaluation", LINE_COLORS[1], marker="o")
    losses.set(ylabel="loss")
    losses.legend()
    scores.set(xlabel="step", ylabel="mean IoU", xlim=(0, None), ylim=(0, None))
    return drawn


def _plot(
    axes: "Axes",
    records: list[dict[str, Any]],
    name: str,
    label: str,
    color: str,
    **style: Any,
) -> None:
    """Plots a metric by step. A null value leaves a gap."""
    points = [(record["step"], record[name]) for record in records if name in record]
    values = [math.nan if value is None else value for _, value in points]
    steps = [step for step, _ in points]
    axes.plot(steps, values, color=color, label=label, clip_on=False, **style)
