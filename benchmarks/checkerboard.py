"""Plots how unevenly upsampling methods err, against how unevenly they start.

    python -m benchmarks.checkerboard --workdir=runs/upsampling --split=test --output=docs/checkerboard.png

Each point is a run of a sweep over model.upsampling. x is the method, in the order of the checkerboard
index that it has with its initial weights. y is the phase error: how unevenly the run errs over the
16 x 16 pixel positions of the predictions (see `phase_errors`). Runs that differ in nothing but the
method and the seed share a color.
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from dense_jax.class_colors import LINE_COLORS
from dense_jax.models.upsampling import UPSAMPLERS
from dense_jax.models.upsampling.measures import checkerboard_index
from dense_jax.report import figures, rows
from dense_jax.workdir.curve import STYLE


def phase_errors(rates: Sequence[np.ndarray]) -> list[float]:
    """Returns how unevenly each run errs over the pixel positions, from its error rates.

    The images cause a pattern, too: that of the median run. It is subtracted from the error rates,
    after each run's were divided by their mean. The standard deviation of the rest is the result.
    """
    relative = [each / np.nanmean(each) for each in rates]
    common = np.median(relative, axis=0)
    return [float(np.nanstd(each - common)) for each in relative]


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
    series: dict[str, list[tuple[str, np.ndarray]]] = {}  # pairs (method, error rates)
    for row in report.rows:
        others = ", ".join(
            f"{field.rpartition('.')[2]}: {label}"
            for field, label in zip(report.fields, row.label, strict=True)
            if field != "model.upsampling"
        )
        for run in row.runs:
            rates = figures.error_rates(dataclasses.replace(row, runs=[run]))
            if rates is None:
                parser.error(f"{run.name} was not evaluated on {arguments.split} with --boundaries")
            series.setdefault(others, []).append((row.label[position], rates))
    methods = sorted(
        dict.fromkeys(row.label[position] for row in report.rows),
        key=lambda method: round(index_of(method), 2),
    )
    with rc_context(fname=STYLE):
        figure = Figure(figsize=(figures.WIDTH, 3.2), layout="constrained")
        axes = figure.subplots()
        for (name, runs), color in zip(series.items(), itertools.cycle(LINE_COLORS)):
            errors = phase_errors([rates for _, rates in runs])
            places = [methods.index(method) for method, _ in runs]
            axes.plot(places, errors, "o", color=color, label=name, alpha=0.8)
            for i, method in enumerate(methods):
                own = [error for place, error in zip(places, errors, strict=True) if place == i]
                print(
                    f"{name}, {method}: index {index_of(method):.2f}, phase error",
                    *map("{:.4f}".format, own),
                )
        axes.set(xlabel="method and its checkerboard index", ylabel="phase error", ylim=(0, None))
        axes.set_xticks(
            range(len(methods)),
            [f"{method} ({index_of(method):.2f})" for method in methods],
            rotation=30,
            ha="right",
        )
        figure.legend(loc="outside lower center")
        figure.savefig(arguments.output, dpi=200)


if __name__ == "__main__":
    main()
