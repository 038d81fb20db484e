"""Scores of a segmentation. `METRICS` declares each of them once, for computing and for showing it.

Region metrics come in two steps. `confusion_matrix` counts pixels on the device, in int32; the host
adds the matrices up in int64 and calls `summarize` once, in float64. Scores are never averaged over
batches, so batch size, padding, order and number of devices cannot change them.

Boundary and object metrics need an image's whole class maps [h, w], on the host: see `boundary` and
`instances`. `aggregation` adds up over the images of a split.

A pixel labeled IGNORE_LABEL, or anything else outside [0, num_classes), counts nowhere. A class
that has nothing to score is NaN, not 0 and not 1, and means leave it out.

To add a region metric, add its formula to METRICS; to add a boundary or an object metric, write a
function in `boundary` or `instances` and add a line to METRICS.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from dense_jax.metrics import boundary, instances

# Version of the metric definitions. Increase it when the same prediction would be scored differently.
CONVENTION = 1

PerClass = Float64[np.ndarray, " c"]
Scores = dict[str, float | PerClass]


class PixelCounts(NamedTuple):
    """The sums of a confusion matrix, in float64; region metrics are functions of them."""

    true: PerClass  # pixels of the class in the label
    predicted: PerClass
    hit: PerClass  # in both
    total: np.float64  # of all classes


class Metric(NamedTuple):
    """A metric: how it is computed, how it adds up over images, and how it is shown."""

    name: str
    label: str  # heads its columns
    function: Callable[..., Any]  # returns [c], or a number if it is not per_class
    # What `function` takes, and how its results add up over the images of a split:
    # "region"    a PixelCounts. The images' confusion matrices are added up.
    # "boundary"  a boundary.MapPair. The score is the mean over images; or, if `pooled`, `function`
    #             returns [c, 2], a numerator and a denominator, and the score is the ratio of sums.
    # "object"    the objects of prediction and label. The score is the mean over images.
    kind: str = "region"
    per_class: bool = True
    averaged: bool = True  # whether there is a mean over classes, mean_NAME
    pooled: bool = False
    # Whether there is also a mean over images of each image's mean over the classes in its label.
    image_mean: bool = False
    unit: str = "%"  # or "pixels"; a score in percent is a fraction in files
    higher_is_better: bool = True
    reported: bool = True  # whether the report's table has a column of it

    @property
    def score(self) -> str:
        """The name of the one number that scores a split."""
        return f"mean_{self.name}" if self.per_class else self.name

    @property
    def score_label(self) -> str:
        """The label of that number."""
        return f"mean {self.label}" if self.per_class else self.label


_number = functools.partial(Metric, per_class=False)
_distance = functools.partial(
    Metric, kind="boundary", unit="pixels", higher_is_better=False, reported=False
)
_object = functools.partial(Metric, kind="object", per_class=False, reported=False)


def _binary_accuracy(n: PixelCounts) -> PerClass:
    score = (n.total - n.true - n.predicted + 2 * n.hit) / n.total
    return np.where(n.true + n.predicted > 0, score, np.nan)


def _weighted_iou(n: PixelCounts) -> float:
    iou = n.hit / (n.true + n.predicted - n.hit)
    return np.nansum(n.true * iou) / n.total


# In the order of their columns. Where a region metric is 0 / 0 there is nothing to score: NaN.
# accuracy is the recall. binary_accuracy = (hit + true negatives) / total, of a class against all
# others, is much larger than pixel_accuracy. The names are those of Long et al. 2015, "Fully
# convolutional networks", section 5.
_ALL = (
    Metric("iou", "IoU", lambda n: n.hit / (n.true + n.predicted - n.hit)),
    Metric("dice", "Dice", lambda n: 2 * n.hit / (n.true + n.predicted)),
    _number("pixel_accuracy", "pixel accuracy", lambda n: n.hit.sum() / n.total),
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
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def of_kind(kind: str) -> list[Metric]:
    """Returns the metrics of a kind: "region", "boundary" or "object"."""
    return [metric for metric in METRICS.values() if metric.kind == kind]


def summarize(counts: ArrayLike) -> Scores:
    """Returns every region metric of a confusion matrix (row = truth), computed in float64.

    A metric with one value per class comes by its name, as [c]; of iou, dice and accuracy there is
    also the mean without NaN, mean_NAME. Raises ValueError for a matrix that is not square or has a
    negative count, the mark of an int32 overflow.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"a confusion matrix is square, not {counts.shape}")
    if not np.all(counts >= 0):
        raise ValueError(f"negative or NaN count {counts.min()}: was the sum kept in int64?")
    counts = counts.astype(np.float64)
    pixels = PixelCounts(counts.sum(1), counts.sum(0), np.diag(counts), counts.sum())
    with np.errstate(invalid="ignore"):
        values = {metric: metric.function(pixels) for metric in of_kind("region")}
    means: Scores = {m.score: mean(np.ravel(value)) for m, value in values.items() if m.averaged}
    return means | {m.name: value for m, value in values.items() if m.per_class}


def named_scores(scores: Mapping[str, Any], class_names: Iterable[str]) -> dict[str, float]:
    """Converts scores by name to flat paths: eval/mean_iou, eval/iou/CLASS."""
    paths: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, float):
            paths[f"eval/{name}"] = value
        else:
            for class_name, score in zip(class_names, value, strict=True):
                paths[f"eval/{name}/{class_name}"] = float(score)
    return paths


def image_mean_ious(matrices: np.ndarray) -> Float64[np.ndarray, " n"]:
    """Returns the mean IoU of each image alone, from matrices [n, c, c]; NaN without a pixel."""
    return np.array([summarize(matrix)["mean_iou"] for matrix in matrices])


def mean(values: np.ndarray) -> float:
    """Returns the mean without NaN; NaN, silently, if nothing is left."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else math.nan


def __getattr__(name: str) -> Any:
    """Gives `metrics.confusion_matrix`, which imports jax only for those who ask for it."""
    if name == "confusion_matrix":
        from dense_jax.metrics.confusion import confusion_matrix

        return confusion_matrix
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
