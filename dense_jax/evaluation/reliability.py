"""Draws reliability diagrams. Never imports JAX."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dense_jax.class_colors import LINE_COLORS
from dense_jax.metrics.calibration import NUM_BINS, Reliability, errors
from dense_jax.workdir.curve import DPI, STYLE

if TYPE_CHECKING:
    from typing import IO

INCHES = 4.0, 5.2


def draw(file: "IO[bytes]", histograms: Mapping[str, Reliability]) -> None:
    """Writes a PNG: the accuracy against the confidence, above the share of pixels in each bin.

    histograms: Those of the split by the name of their line; see `metrics.calibration`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(fname=STYLE):
        figure = Figure(figsize=INCHES, layout="constrained")
        accuracies, shares = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        accuracies.plot((0, 1), (0, 1), color="gray", linestyle="--", linewidth=0.8)
        for (name, reliability), color in zip(histograms.items(), LINE_COLORS, strict=False):
            pixels, hits, probability = reliability[-1].T
            some = pixels > 0
            label = f"{name}, ECE {errors(reliability)[-1]:.3f}"
            x, y = probability[some] / pixels[some], hits[some] / pixels[some]
            accuracies.plot(x, y, color=color, marker="o", markersize=3, label=label)
            edges = np.linspace(0, 1, NUM_BINS + 1)
            shares.stairs(pixels / max(1, pixels.sum()), edges, color=color)
        accuracies.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        accuracies.legend(loc="upper left")
        shares.set(xlabel="confidence: the largest probability", ylabel="share of pixels")
        figure.savefig(file, format="png", dpi=DPI)
