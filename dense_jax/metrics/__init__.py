"""Metrics for segmentation. `METRICS` declares how each metric is computed and displayed.

Region metrics are computed in two steps. `confusion_matrix` counts pixels on the device, in int32.
The host adds up the matrices in int64 and calls `summarize` once, in float64. Scores are never
averaged over batches, so the batch size, padding, order and number of devices cannot change them.

Boundary and object metrics are computed on the host from complete class or object maps [h, w]; see
`boundary` and `instances`. Scores of probabilities come from sums like the confusion matrix, too;
see `calibration`. `aggregation` combines the results for the images of a split.

A pixel is not counted if its label is IGNORE_LABEL or any other number outside [0, num_classes). A
class with nothing to score gets NaN, not 0 or 1, and is excluded from the means.

To add a region metric, add its formula to `_ALL`. To add a boundary or object metric, write a
function in `boundary` or `instances` and add a line to `_ALL`.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from dense_jax.metrics import boundary, calibration, instances

# The version of the metric definitions. Increase it when a prediction's score would change.
CONVENTION = 1

PerClass = Float64[np.ndarray, " c"]
Scores = dict[str, float | PerClass]


class PixelCounts(NamedTuple):
    """The pixel counts from which region metrics are computed, in float64 if for `Metric`s.

    Each has the leading axes of the confusion matrices. With regions, a class is a region.
    """

    true: Any  # [c], number of pixels of each class in the label
    predicted: Any  # [c], number of pixels of each class in the prediction
    hit: Any  # [c], number of correctly predicted pixels of each class
    total: Any  # number of pixels of all classes
    right: Any  # number of correctly predicted pixels, with regions the mean over regions


def pixel_counts(matrices: np.ndarray, has_regions: bool) -> PixelCounts:
    """Returns the counts of confusion matrices [..., c, c], or with regions [..., r, 2, 2]."""
    right = np.trace(matrices, axis1=-2, axis2=-1)
    if has_regions:
        true, predicted = matrices[..., 1, :].sum(-1), matrices[..., 1].sum(-1)
        total = matrices[..., 0, :, :].sum((-2, -1))
        return PixelCounts(true, predicted, matrices[..., 1, 1], total, right.mean(-1))
    true, predicted = matrices.sum(-1), matrices.sum(-2)
    hit = np.diagonal(matrices, axis1=-2, axis2=-1)
    return PixelCounts(true, predicted, hit, true.sum(-1), right)


class Metric(NamedTuple):
    """Defines how a metric is computed, aggregated over images, and displayed."""

    name: str
    label: str  # the column heading
    function: Callable[..., Any]  # returns [c], or a number if not per_class
    # The kind sets the argument of `function` and the aggregation over the images of a split:
    # "region"    The argument is a PixelCounts of the sum of the images' confusion matrices.
    # "boundary"  The argument is a boundary.MapPair. The score is the mean over images. If `pooled`,
    #             `function` returns [c, 2], a numerator and a denominator, and the score is the
    #             ratio of their sums.
    # "object"    The arguments are the objects of prediction and label. The score is the mean over
    #             images.
    # "probability"  The argument is a calibration.ProbabilitySums of the split.
    # "calibrated"   The same, with the network's temperature.
    kind: str = "region"
    per_class: bool = True
    averaged: bool = True  # whether mean_NAME, the mean over classes, is a score
    pooled: bool = False
    # Whether the mean over the classes in an image's label is also averaged over the images.
    image_mean: bool = False
    # "pixels", "nats" or "". Scores without a unit are at most 1, Brier scores at most 2.
    unit: str = ""
    higher_is_better: bool = True
    reported: bool = True  # whether the report's table has a column for the metric

    @property
    def score(self) -> str:
        """Returns the key of the metric's summary score, such as "mean_iou"."""
        return f"mean_{self.name}" if self.per_class else self.name

    @property
    def score_label(self) -> str:
        """Returns the displayed name of the metric's summary score, such as "mean IoU"."""
        return f"mean {self.label}" if self.per_class else self.label


_number = functools.partial(Metric, per_class=False)
_distance = functools.partial(
    Metric, kind="boundary", unit="pixels", higher_is_better=False, reported=False
)
_probability = functools.partial(
    Metric, kind="probability", per_class=False, higher_is_better=False, reported=False
)
_object = functools.partial(Metric, kind="object", per_class=False, reported=False)


def _binary_accuracy(n: PixelCounts) -> PerClass:
    score = (n.total - n.true - n.predicted + 2 * n.hit) / n.total
    return np.where(n.true + n.predicted > 0, score, np.nan)


def _weighted_iou(n: PixelCounts) -> float:
    iou = n.hit / (n.true + n.predicted - n.hit)
    return np.nansum(n.true * iou) / n.true.sum()


_PROBABILITY = (
    _probability("nll", "NLL", lambda n: n.nll / n.num_pixels, unit="nats", reported=True),
    _probability("brier", "Brier score", lambda n: n.brier / n.num_pixels),
    _probability("ece", "ECE", lambda n: calibration.errors(n.reliability)[-1], reported=True),
    _probability(
        "classwise_ece",
        "class-wise ECE",
        lambda n: calibration.errors(n.reliability)[:-1],
        per_class=True,
    ),
)


# The metrics, in the order of the report's columns. A region metric that is 0 / 0 becomes NaN.
# `accuracy` is the recall. `binary_accuracy` = (hit + true negatives) / total compares one
# class with all others, so it is much larger than `pixel_accuracy`. The names follow Long et al.
# 2015, "Fully convolutional networks", section 5.
_ALL = (
    Metric("iou", "IoU", lambda n: n.hit / (n.true + n.predicted - n.hit)),
    Metric("dice", "Dice", lambda n: 2 * n.hit / (n.true + n.predicted)),
    _number("pixel_accuracy", "pixel accuracy", lambda n: n.right / n.total),
    Metric("accuracy", "accuracy", lambda n: n.hit / n.true),
    Metric("precision", "precision", lambda n: n.hit / n.predicted, averaged=False),
    Metric("binary_accuracy", "binary accuracy", _binary_accuracy, averaged=False),
    _number("frequency_weighted_iou", "frequency weighted IoU", _weighted_iou, reported=False),
    Metric("boundary_f1", "boundary F1", boundary.boundary_f1, "boundary", image_mean=True),
    Metric("boundary_iou", "boundary IoU", boundary.boundary_iou, "boundary", pooled=True),
    _distance("hausdorff95", "Hausdorff 95", boundary.hausdorff95),
    _distance(
        "average_surface_distance",
        "average surface distance",
        boundary.average_surface_distance,
    ),
    _object("rand_score", "Rand score", instances.rand_score),
    _object("information_score", "information score", instances.information_score),
    *_PROBABILITY,
    *(
        metric._replace(
            name=f"calibrated_{metric.name}",
            label=f"calibrated {metric.label}",
            kind="calibrated",
            reported=False,
        )
        for metric in _PROBABILITY
    ),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def of_kind(kind: str) -> list[Metric]:
    """Returns the metrics of a kind ("region", "boundary" or "object")."""
    return [metric for metric in METRICS.values() if metric.kind == kind]


def summarize_probabilities(sums: calibration.ProbabilitySums, kind: str) -> Scores:
    """Returns the metrics of a kind, "probability" or "calibrated", by name.

    For a metric with one value per class, mean_NAME is the mean over all classes.
    """
    scores: Scores = {}
    with np.errstate(invalid="ignore"):
        for metric in of_kind(kind):
            value = np.asarray(metric.function(sums))
            scores[metric.score] = float(value.mean())
            if metric.per_class:
                scores[metric.name] = value
    return scores


def summarize(counts: ArrayLike) -> Scores:
    """Returns all region metrics by name, given a confusion matrix (rows are true classes).

    Metrics with one value per class are arrays [c]. For iou, dice and accuracy, mean_NAME is the
    mean over the classes that are not NaN. Given the matrices [r, 2, 2] of regions, these take the
    place of the classes, and pixel_accuracy is the mean over regions. Raises ValueError if the
    matrix is not square or has a negative count (a sign of an int32 overflow).
    """
    counts = np.asarray(counts)
    has_regions = counts.ndim == 3 and counts.shape[1:] == (2, 2)
    if not has_regions and (counts.ndim != 2 or counts.shape[0] != counts.shape[1]):
        raise ValueError(f"a confusion matrix is square, not {counts.shape}")
    if not np.all(counts >= 0):
        raise ValueError(f"negative or NaN count {counts.min()}: was the sum kept in int64?")
    pixels = pixel_counts(counts.astype(np.float64), has_regions)
    with np.errstate(invalid="ignore"):
        values = {metric: metric.function(pixels) for metric in of_kind("region")}
    means: Scores = {m.score: mean(np.ravel(value)) for m, value in values.items() if m.averaged}
    return means | {m.name: value for m, value in values.items() if m.per_class}


def named_scores(scores: Mapping[str, Any], class_names: Iterable[str]) -> dict[str, float]:
    """Flattens scores to {path: number}. Example paths are eval/mean_iou and eval/iou/<class>."""
    paths: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, float):
            paths[f"eval/{name}"] = value
        else:
            for class_name, score in zip(class_names, value, strict=True):
                paths[f"eval/{name}/{class_name}"] = float(score)
    return paths


def image_mean_ious(matrices: np.ndarray) -> Float64[np.ndarray, " n"]:
    """Returns the mean IoU for each of n confusion matrices, or NaN for a matrix of zeros."""
    return np.array([summarize(matrix)["mean_iou"] for matrix in matrices])


def mean(values: np.ndarray) -> float:
    """Returns the mean of the values that are not NaN. If there are none, returns NaN."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else math.nan


def __getattr__(name: str) -> Any:
    """Imports `confusion` on first use, so that importing `metrics` does not import jax."""
    if name in ("confusion_matrix", "region_matrices"):
        from dense_jax.metrics import confusion

        return getattr(confusion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
