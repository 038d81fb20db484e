"""Plots how unevenly upsampling methods err, against how unevenly they start.

    python -m benchmarks.checkerboard --workdir=runs/upsampling --split=test --output=docs/checkerboard.png

Each point is a row of a sweep over model.upsampling. Its x is the checkerboard index of the method
with its initial weights. Its y is the spread of the error rates over the 16 x 16 pixel positions of
the predictions: their standard deviation divided by their mean. Rows that differ in nothing but
the method share a color.
"""

import argparse
import functools
import itertools
import pathlib

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from dense_jax.class_colors import LINE_COLORS
from dense_jax.models.upsampling import UPSAMPLERS
from dense_jax.models.upsampling.measures import checkerboard_index
from dense_jax.report import figures, rows
from dense_jax.workdir.curve import STYLE


def main() -> None:
    """Parses the flags, draws the plot and prints its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="a sweep's workdir")
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", required=True, help="image file")
    arguments = parser.parse_args()
    report = rows.build(arguments.workdir, arguments.split)
    if "model.upsampling" not in report.fields:
        parser.error(f"the rows of {arguments.workdir} are not told apart by model.upsampling")
    position = report.fields.index("model.upsampling")
    index_of = functools.cache(
        lambda method: checkerboard_index(UPSAMPLERS[method](features=256), initial=True)
    )
    series: dict[str, list[tuple[float, float]]] = {}
    for row in report.rows:
        method = row.label[position]
        index, rates = index_of(method), figures.error_rates(row)
        if rates is None:
            parser.error(f"{row.name} was not evaluated on {arguments.split} with its boundaries")
        spread = float(np.nanstd(rates) / np.nanmean(rates))
        others = ", ".join(row.label[:position] + row.label[position + 1 :])
        series.setdefault(others, []).append((index, spread))
        print(f"{others} {method}: index {index:.2f}, spread of the error rate {spread:.4f}")
    with rc_context(fname=STYLE):
        figure = Figure(figsize=(figures.WIDTH, 2.6), layout="constrained")
        axes = figure.subplots()
        for (name, points), color in zip(series.items(), itertools.cycle(LINE_COLORS)):
            axes.plot(*zip(*points, strict=True), "o", color=color, label=name, alpha=0.8)
        axes.set(
            xlabel="checkerboard index at the start",
            ylabel="spread of the error rate\nover pixel positions",
            ylim=(0, None),
        )
        figure.legend(loc="outside lower center", ncols=2)
        figure.savefig(arguments.output, dpi=200)


if __name__ == "__main__":
    main()
