"""Scores of a segmentation: one confusion matrix for every region metric, and boundary metrics.

Region metrics come in two steps. `confusion_matrix` counts pixels on the device, in int32; the host
adds the matrices up in int64 and calls `summarize` once, in float64. Scores are never averaged over
batches, so batch size, padding, order and number of devices cannot change them.

Boundary metrics take one image's class maps [h, w] in numpy and return one float64 per class.

A pixel labelled IGNORE_LABEL, or anything else outside [0, num_classes), counts nowhere. A class
that has nothing to score is NaN, not 0 and not 1, and means leave it out.
"""

import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float64, Int32, Integer
from scipy import ndimage

from dense_jax.labels import IGNORE_LABEL

ClassMap = Integer[np.ndarray, "..."]  # [h, w]; what is not is a ValueError
Mask = Bool[np.ndarray, "h w"]
PerClass = Float64[np.ndarray, " c"]


def confusion_matrix(
    predictions: ArrayLike, labels: ArrayLike, num_classes: int
) -> Int32[Array, "c c"]:
    """Pixel counts: entry [i, j] is the number of pixels of true class i predicted as class j.

    Integers of any one shape. Pixels whose label or prediction is outside [0, num_classes) count
    nowhere. Exact for up to 2**31 - 1 pixels a call: add the results up in int64, on the host.
    ValueError for shapes that differ, for values that are not integers, and for > 255 classes.
    """
    predictions, labels = jnp.asarray(predictions), jnp.asarray(labels)
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} differ")
    for name, values in {"predictions": predictions, "labels": labels}.items():
        if not jnp.issubdtype(values.dtype, jnp.integer):
            raise ValueError(f"{name} must be integer class ids, not {values.dtype}")
    if not 0 < num_classes <= IGNORE_LABEL:
        raise ValueError(f"num_classes must be 1 to {IGNORE_LABEL}, not {num_classes}")
    classes = jnp.arange(num_classes, dtype=jnp.int32)[None, :]
    truth, guess = (x.reshape(-1, 1).astype(jnp.int32) == classes for x in (labels, predictions))
    # A matrix product, since adding to computed positions is slow on a TPU; of bytes into int32,
    # since float32 would lose counts from 2**24 on.
    return jnp.einsum(
        "nc,nk->ck",
        truth.astype(jnp.int8),
        guess.astype(jnp.int8),
        preferred_element_type=jnp.int32,
    )


def summarize(counts: ArrayLike) -> dict[str, float | PerClass]:
    """Every region metric of a confusion matrix (row = truth), on the host in float64.

    With t true pixels of a class, p predicted, h both, n in all; NaN where it is 0 / 0:
      iou = h / (t + p - h)              mean_iou        their mean without NaN
      dice = 2 h / (t + p)               mean_dice       likewise
      accuracy = h / t, the recall       mean_accuracy   likewise
      precision = h / p                  pixel_accuracy  sum h / n
      binary_accuracy = (h + true negatives) / n, of the class against all others, NaN for a class
        without a true or predicted pixel; not pixel_accuracy, and much larger
      frequency_weighted_iou = sum t iou / n
    The four means of Long et al. 2015, "Fully convolutional networks", section 5. ValueError for a
    matrix that is not square or has a negative count, the mark of an int32 overflow.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"a confusion matrix is square, not {counts.shape}")
    if not np.all(counts >= 0):
        raise ValueError(f"negative or NaN count {counts.min()}: was the sum kept in int64?")
    counts = counts.astype(np.float64)
    true, guessed, hit, total = counts.sum(1), counts.sum(0), np.diag(counts), counts.sum()
    with np.errstate(invalid="ignore"):
        iou = hit / (true + guessed - hit)
        dice = 2 * hit / (true + guessed)
        accuracy = hit / true
        binary_accuracy = (total - true - guessed + 2 * hit) / total
        return {
            "pixel_accuracy": float(hit.sum() / total),
            "mean_accuracy": mean(accuracy),
            "mean_iou": mean(iou),
            "frequency_weighted_iou": float(np.nansum(true * iou) / total),
            "mean_dice": mean(dice),
            "iou": iou,
            "dice": dice,
            "accuracy": accuracy,
            "precision": hit / guessed,
            "binary_accuracy": np.where(true + guessed > 0, binary_accuracy, np.nan),
        }


def bootstrap(
    matrices: ArrayLike, *, num_resamples: int = 1000, seed: int = 0
) -> tuple[dict[str, float | PerClass], dict[str, float | PerClass]]:
    """The lower and upper ends of 95 % intervals, over images, of every metric of `summarize`.

    matrices: confusion matrices of n images, [n, c, c]. n images are drawn with replacement,
    num_resamples times, and the 2.5th and 97.5th percentiles taken of the metrics of their sums
    (Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 13). It says how much
    the score depends on which images were tested, not on the training's randomness. Resamples
    without the class do not count; NaN if there are no others.
    """
    matrices = np.asarray(matrices, np.float64)  # for BLAS; sums are exact up to 2^53 pixels
    n, c, _ = matrices.shape
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=num_resamples)
    sums = (draws @ matrices.reshape(n, -1)).reshape(-1, c, c)
    summaries = [summarize(counts) for counts in sums]
    low, high = {}, {}
    for name, first in summaries[0].items():
        values = np.array([summary[name] for summary in summaries]).reshape(num_resamples, -1)
        ends = np.full((2, values.shape[1]), np.nan)
        some = ~np.all(np.isnan(values), axis=0)
        ends[:, some] = np.nanpercentile(values[:, some], (2.5, 97.5), axis=0)
        low[name], high[name] = ends[:, 0].tolist() if isinstance(first, float) else ends
    return low, high


def boundary_f1(
    prediction: ClassMap,
    label: ClassMap,
    *,
    num_classes: int | None = None,
    tolerance: float = 0.0075,
) -> PerClass:
    """F1 of boundary pixels that lie within a distance of the other side's boundary, in [0, 1].

    Precision is the fraction of the prediction's boundary pixels at most `tolerance` (a fraction of
    the image's diagonal) from the label's boundary, recall the reverse, per class (Csurka et al.
    2013, "What is a good evaluation measure for semantic segmentation?", section 2.3). A boundary
    pixel belongs to the class and one of its 4 neighbours does not, or lies beyond the image; an
    ignored neighbour makes no boundary.

    0 for a class with a boundary on one side only, NaN for none. `num_classes`, here and below,
    is one more than the largest class seen if not given.
    """
    reach = tolerance * _diagonal(label)  # in pixels

    def score(forth: np.ndarray, back: np.ndarray) -> float:
        if not forth.size or not back.size:
            return 0.0
        precision, recall = np.mean(forth <= reach), np.mean(back <= reach)
        return float(2 * precision * recall / max(precision + recall, 1e-12))

    return _per_class(score, prediction, label, num_classes)


def hausdorff95(
    prediction: ClassMap, label: ClassMap, *, num_classes: int | None = None
) -> PerClass:
    """95th percentile of the distance between boundaries, in pixels.

    The larger of the two directions' percentiles, prediction to label and label to prediction
    (some tools take one percentile of both together, which is smaller). Boundaries are those of
    `boundary_f1`. The diagonal of the image for a class with a boundary on one side only, so that
    missing an object is never better than finding it badly; NaN for none.
    """

    def score(forth: np.ndarray, back: np.ndarray) -> float:
        return max(float(np.percentile(d, 95)) for d in (forth, back) if d.size)

    return _per_class(score, prediction, label, num_classes)


def average_surface_distance(
    prediction: ClassMap, label: ClassMap, *, num_classes: int | None = None
) -> PerClass:
    """Mean distance between boundaries, in pixels: average symmetric surface distance (ASSD).

    The mean over the boundary pixels of both sides together of the distance to the other side's
    boundary. Boundaries, and classes missing on one side or both, as in `hausdorff95`.
    """

    def score(forth: np.ndarray, back: np.ndarray) -> float:
        return float(np.mean(np.concatenate([forth, back])))

    return _per_class(score, prediction, label, num_classes)


def boundary_iou(
    prediction: ClassMap, label: ClassMap, *, num_classes: int | None = None, width: float = 0.02
) -> PerClass:
    """IoU of only those pixels of each mask that are near its own boundary, in [0, 1].

    Near is at most max(1, round(width * diagonal)) pixels, along rows, columns or diagonals, from a
    valid pixel outside the mask or from beyond the image (Cheng et al. 2021, "Boundary IoU",
    section 4, and their code). 0 for a class that is missing on one side, NaN for none.
    """
    pixels = max(1, round(width * _diagonal(label)))
    scores = []
    for guess, truth, valid in _masks(prediction, label, num_classes):
        near = [_rim(mask, valid, pixels, "chessboard") for mask in (guess, truth)]
        union = np.sum(near[0] | near[1])
        scores.append(np.sum(near[0] & near[1]) / union if union else np.nan)
    return np.array(scores, np.float64)


def mean(values: PerClass) -> float:
    """Mean without NaN; NaN, silently, if nothing is left."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else math.nan


def _diagonal(label: ClassMap) -> float:
    return math.hypot(*label.shape)


def _masks(
    prediction: ClassMap, label: ClassMap, num_classes: int | None
) -> Iterator[tuple[Mask, Mask, Mask]]:
    """Per class: its valid pixels in the prediction, in the label, and the valid pixels of all."""
    if prediction.shape != label.shape or label.ndim != 2:
        raise ValueError(f"class maps are both [h, w], not {prediction.shape} and {label.shape}")
    valid = (label >= 0) & (label != IGNORE_LABEL)
    if num_classes is None:
        num_classes = 1 + max(int(x[valid].max(initial=0)) for x in (prediction, label))
    valid &= label < num_classes
    for c in range(num_classes):
        yield (prediction == c) & valid, (label == c) & valid, valid


def _rim(mask: Mask, valid: Mask, width: int, metric: str) -> Mask:
    """The mask's pixels within `width` pixels of a valid pixel outside it or of the image's end."""
    if not mask.any():
        return mask
    outside = np.pad(valid & ~mask, 1, constant_values=True)
    return mask & (ndimage.distance_transform_cdt(~outside, metric)[1:-1, 1:-1] <= width)


def _per_class(
    score: Callable[[np.ndarray, np.ndarray], float],
    prediction: ClassMap,
    label: ClassMap,
    num_classes: int | None,
) -> PerClass:
    """score(forth, back) per class; NaN for a class with no boundary on either side.

    forth holds the distance, in pixels, from each boundary pixel of the prediction to the label's
    boundary, back the reverse; the diagonal where there is no boundary to reach.
    """

    def distances(start: Mask, goal: Mask) -> np.ndarray:
        if not goal.any():
            return np.full(start.sum(), _diagonal(label))
        return np.asarray(ndimage.distance_transform_edt(~goal))[start]

    scores = []
    for guess, truth, valid in _masks(prediction, label, num_classes):
        guess, truth = (_rim(mask, valid, 1, "taxicab") for mask in (guess, truth))
        some = guess.any() or truth.any()
        scores.append(score(distances(guess, truth), distances(truth, guess)) if some else np.nan)
    return np.array(scores, np.float64)
