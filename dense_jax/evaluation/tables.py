"""Formats tables and the scores of an evaluation as Markdown. Never imports JAX."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dense_jax import metrics
from dense_jax.evaluation import baselines
from dense_jax.metrics import Metric, boundary

BOUNDARY_NOTE = (
    "Boundary scores: F1 within 0.75 % of the image diagonal; IoU of the rims of each class, 2 % "
    "of the diagonal wide, over all images at once; 95th percentile and mean of the distances in "
    "pixels. F1 and distances are means over the images whose label or prediction contains the "
    "class. If only the label (missed) or only the prediction (invented) contains the class, F1 is "
    "0 and the distances are the diagonal."
)
# The scores of an ensemble that are compared with those of its networks.
GAINS = ("mean_iou", "mean_dice", "pixel_accuracy", "nll", "brier", "ece", "mean_classwise_ece")
PROBABILITY_NOTE = (
    "Probabilities: the negative log-likelihood of the true class and the Brier score, means over "
    "pixels; the expected calibration error (ECE) of the most probable class, and of all classes, "
    "in 15 bins. Lower is better."
)
MANY = 20  # more classes than this are sorted
_KNOWN_AS = {"boundary_f1": " (SegNet's BF)"}


def markdown_table(
    lines: Iterable[Sequence[str]], num_names: int = 1, *, padded: bool = False
) -> str:
    """Returns a Markdown table without a trailing newline.

    lines: The rows, starting with the header. Each cell is Markdown; `escape` converts plain text.
    num_names: The number of left-aligned text columns. The columns after them contain numbers.
    padded: Whether to align the columns with spaces, so that the table is readable as plain text.
    """
    head, *body = map(list, lines)
    widths = [0] * len(head)
    if padded:
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    names = [i < num_names for i in range(len(head))]
    rule = [
        "-" * max(3, width) if name else "-" * max(3, width - 1) + ":"
        for name, width in zip(names, widths, strict=True)
    ]
    rows = [
        [
            cell.ljust(width) if name else cell.rjust(width)
            for cell, width, name in zip(line, widths, names, strict=True)
        ]
        for line in (head, rule, *body)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def escape(name: str) -> str:
    """Escapes GitHub Markdown in a name, except for underscores within a word (snake_case)."""
    name = re.sub(r"([\\`*\[\]<>|~&$])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", name)
    return " ".join(name.split())


def to_markdown(evaluation: Mapping[str, Any]) -> str:
    """Returns the contents of evaluation_SPLIT.md: the mean scores and each class's scores.

    Classes without a score are named in one line and have no rows. If more than MANY classes are
    left, their rows are sorted by the classes' shares of the labels' pixels.

    evaluation: The result of `dense_jax.evaluate.evaluate`, in which an undefined score is NaN.
    """
    name = f"{evaluation['dataset']} {evaluation['root']}".rstrip()
    about = (
        f"{evaluation['num_images']} images, {evaluation['num_pixels']:,} valid pixels, at the "
        "labels' own resolution, with 95 % intervals over images (bootstrap). Ignored "
        "pixels count nowhere. The mean over images is the average of each image's own score."
    )
    parts = [f"# {name}, {evaluation['split']}, step {evaluation['step']}", about]
    if without := evaluation["classes_without_score"]:
        parts.append(f"In no label and never predicted, so in no mean: {', '.join(without)}.")
    if evaluation["regions"]:
        listed = [f"{name} ({', '.join(c)})" for name, c in evaluation["regions"].items()]
        parts.append(f"Scores are those of regions: {escape('; '.join(listed))}.")
    parts += map(escape, baselines.sentences(evaluation))
    if len(_shown(evaluation)) > MANY:
        parts.append("Classes are sorted by their share of the labels' pixels, largest first.")
    parts += _region_tables(evaluation)
    measured = [m for m in metrics.of_kind("boundary") if f"eval/{m.score}" in evaluation]
    if measured:
        parts += _boundary_tables(evaluation, measured)
    if evaluation["foreground"]:
        parts += _foreground_table(evaluation)
    if "eval/nll" in evaluation:
        parts += _probability_tables(evaluation)
    return "\n\n".join(parts) + "\n"


def _region_tables(evaluation: Mapping[str, Any]) -> list[str]:
    region = metrics.of_kind("region")
    numbers = [metric for metric in region if metric.averaged]
    per_class = [metric for metric in region if metric.per_class]
    means = [
        ["", *(metric.score_label for metric in numbers)],
        _row(evaluation, "all pixels", numbers, lambda m: m.score),
        _row(evaluation, "mean over images", numbers, lambda m: f"mean_over_images/{m.score}"),
    ]
    classes = [["", *(metric.label for metric in per_class)], *_class_rows(evaluation, per_class)]
    return [markdown_table(means), markdown_table(classes)]


def _boundary_tables(evaluation: Mapping[str, Any], measured: Sequence[Metric]) -> list[str]:
    images = [evaluation[f"num_images_{side}"] for side in ("missed", "invented")]
    counts_of = dict(zip(evaluation["class_names"], zip(*images, strict=True), strict=True))
    sides = [counts_of[name] for name in _shown(evaluation)]
    rows = zip(_class_rows(evaluation, measured), sides, strict=True)
    lines = [
        ["", *(metric.label for metric in measured), "images missed", "invented"],
        [*_row(evaluation, "mean", measured, lambda m: m.score), "", ""],
        *([*row, *map(str, counts)] for row, counts in rows),
    ]
    image_means = [
        f"Mean {metric.label} of a label's classes, over images{_KNOWN_AS.get(metric.name, '')}: "
        + _cell(evaluation, metric, f"mean_over_images/{metric.score}")
        for metric in measured
        if metric.image_mean
    ]
    iou = metrics.METRICS["iou"]
    near = [_cell(evaluation, iou, f"trimap_mean_iou/{width}") for width in boundary.BAND_WIDTHS]
    bands = [
        ["", *(f"{width} px" for width in boundary.BAND_WIDTHS)],
        ["mean IoU closer than this to the label's boundaries", *near],
    ]
    return [BOUNDARY_NOTE, markdown_table(lines), *image_means, markdown_table(bands)]


def _foreground_table(evaluation: Mapping[str, Any]) -> list[str]:
    note = (
        f"Foreground: {', '.join(evaluation['foreground'])}, as one class against all others. Its "
        "connected components are the objects in the Rand and information scores, which are "
        "averaged over the images whose label has objects."
    )
    region = [metric for metric in metrics.of_kind("region") if metric.per_class]
    objects = [m for m in metrics.of_kind("object") if f"eval/{m.score}" in evaluation]
    columns = [*region, *objects]

    def over_images(metric: Metric) -> str:
        is_region = metric.kind == "region"
        return f"mean_over_images/foreground_{metric.name}" if is_region else metric.score

    lines = [
        ["", *(metric.label for metric in columns)],
        _row(evaluation, "all pixels", columns, lambda m: f"foreground_{m.name}"),
        _row(evaluation, "mean over images", columns, over_images),
    ]
    return [note, markdown_table(lines)]


def _probability_tables(evaluation: Mapping[str, Any]) -> list[str]:
    columns = metrics.of_kind("probability")
    lines = [
        ["probabilities", *(f"{m.score_label}{f', {m.unit}' * bool(m.unit)}" for m in columns)],
        _row(evaluation, "as trained", columns, lambda m: m.score),
    ]
    if fitted := evaluation["calibration"]:
        name = f"with temperature {fitted['temperature']:.3f}"
        calibrated = metrics.of_kind("calibrated")
        lines.append(_row(evaluation, name, calibrated, lambda m: m.score))
    parts = [PROBABILITY_NOTE, markdown_table(lines)]
    if fitted:
        low, high = fitted["interval"]
        interval = "" if np.isnan(low + high) else f" ({low:.3f} to {high:.3f})"
        temperature = f"{fitted['temperature']:.3f}{interval}"
        flatters = fitted["split"] == evaluation["split"]
        parts.append(
            f"The temperature was chosen on {fitted['split']}: {temperature}."
            + " It flatters the scores of the same split." * flatters
        )
        if fitted["thresholds"]:
            parts += ["Thresholds of the highest Dice on the same split, and what they bring:"]
            parts.append(_threshold_table(evaluation))
    if gains := evaluation.get("gains"):
        labels = {m.score: m.score_label for m in metrics.METRICS.values()}
        rows = [["", "ensemble", "mean of its networks", "lowest", "highest", "gain"]]
        for name in GAINS:
            gain, singles = gains[f"eval/{name}"], gains[f"eval/{name}"]["networks"]
            numbers = (evaluation[f"eval/{name}"], np.mean(singles), min(singles), max(singles))
            low, high = gain["interval"]
            shown = f"{gain['gain']:+.3f}"
            shown += "" if np.isnan(low + high) else f" ({low:+.3f} to {high:+.3f})"
            rows.append([labels[name], *(f"{number:.3f}" for number in numbers), shown])
        networks = ", ".join(f"{n['workdir']} (step {n['step']})" for n in evaluation["networks"])
        about = f"The ensemble is the mean probability of {escape(networks)}. Gains have intervals "
        parts += [about + "over images, the same for the ensemble and its networks."]
        parts.append(markdown_table(rows))
    return parts


def _threshold_table(evaluation: Mapping[str, Any]) -> str:
    columns = [metrics.METRICS[name] for name in ("iou", "dice")]
    lines = [["", "threshold", *(m.label for m in columns)]]
    for name, threshold in evaluation["calibration"]["thresholds"].items():
        cells = _row(evaluation, name, columns, lambda m, name=name: f"calibrated_{m.name}/{name}")
        lines.append([cells[0], f"{threshold:.2f}", *cells[1:]])
    means = _row(evaluation, "mean", columns, lambda m: f"calibrated_{m.score}")
    return markdown_table([*lines, [means[0], "", *means[1:]]])


def _class_rows(evaluation: Mapping[str, Any], columns: Sequence[Metric]) -> list[list[str]]:
    return [
        _row(evaluation, name, columns, lambda m, name=name: f"{m.name}/{name}")
        for name in _shown(evaluation)
    ]


def _shown(evaluation: Mapping[str, Any]) -> list[str]:
    """Returns the classes that have rows, in the order of the rows."""
    names = evaluation["class_names"]
    shown = [name for name in names if name not in evaluation["classes_without_score"]]
    if len(shown) > MANY:
        counts = np.array(evaluation["confusion_matrix"])
        pixels = metrics.pixel_counts(counts, counts.ndim == 3).true
        shown.sort(key=lambda name: -pixels[names.index(name)])
    return shown


def _row(
    evaluation: Mapping[str, Any],
    name: str,
    columns: Sequence[Metric],
    path: Callable[[Metric], str],
) -> list[str]:
    return [escape(name), *(_cell(evaluation, metric, path(metric)) for metric in columns)]


def _cell(evaluation: Mapping[str, Any], metric: Metric, path: str) -> str:
    """Formats a score with its interval. NaN gives "no score", and a missing key gives ""."""
    score = evaluation.get(f"eval/{path}")
    if score is None:
        return ""
    if np.isnan(score):
        return "no score"
    digits = 2 if metric.unit == "pixels" else 3
    low, high = evaluation["intervals"][f"eval/{path}"]
    interval = "" if np.isnan(low + high) else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{score:.{digits}f}{interval}"
