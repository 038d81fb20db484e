"""Scores of a segmentation: one confusion matrix for every region metric, and boundary metrics.

Region metrics come in two steps. `confusion_matrix` counts pixels on the device, in int32; the host
adds the matrices up in int64 and calls `summarize` once, in float64. Scores are never averaged over
batches, so batch size, padding, order and number of devices cannot change them.

Boundary metrics are those of `boundary`, by the same names: they take one image's class maps [h, w]
in numpy and return one float64 per class.

A pixel labeled IGNORE_LABEL, or anything else outside [0, num_classes), counts nowhere. A class
that has nothing to score is NaN, not 0 and not 1, and means leave it out.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float64, Int32

from dense_jax.labels import IGNORE_LABEL

# Of all scores: another number wherever the same prediction would get another score.
CONVENTION = 1

PerClass = Float64[np.ndarray, " c"]
Scores = dict[str, float | PerClass]


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
    truth, guess = (x.reshape(-1).astype(jnp.int32) for x in (labels, predictions))
    return jax.lax.platform_dependent(
        truth,
        guess,
        cpu=functools.partial(_count_by_adding, num_classes=num_classes),
        default=functools.partial(_count_by_product, num_classes=num_classes),
    )


def _count_by_adding(
    truth: Int32[Array, " n"], guess: Int32[Array, " n"], num_classes: int
) -> Int32[Array, "c c"]:
    """Adds 1 to an entry for each pixel: on a CPU more than 10 times as fast as the product."""
    valid = (truth >= 0) & (truth < num_classes) & (guess >= 0) & (guess < num_classes)
    entry = jnp.where(valid, truth * num_classes + guess, num_classes**2)
    counts = jnp.bincount(entry, length=num_classes**2 + 1)
    return counts[:-1].reshape(num_classes, num_classes).astype(jnp.int32)


def _count_by_product(
    truth: Int32[Array, " n"], guess: Int32[Array, " n"], num_classes: int
) -> Int32[Array, "c c"]:
    """The product of one-hot matrices: adding to computed positions is slow on a TPU.

    Of bytes into int32, since float32 would lose counts from 2**24 on.
    """
    classes = jnp.arange(num_classes, dtype=jnp.int32)[None, :]
    return jnp.einsum(
        "nc,nk->ck",
        (truth[:, None] == classes).astype(jnp.int8),
        (guess[:, None] == classes).astype(jnp.int8),
        preferred_element_type=jnp.int32,
    )


def summarize(counts: ArrayLike) -> Scores:
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


def named_scores(summary: Mapping[str, Any], class_names: Iterable[str]) -> dict[str, float]:
    """What `summarize` returns as flat paths: eval/mean_iou, eval/iou/CLASS."""
    scores: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, float):
            scores[f"eval/{name}"] = value
        else:
            for class_name, each in zip(class_names, value, strict=True):
                scores[f"eval/{name}/{class_name}"] = float(each)
    return scores


def bootstrap(
    statistics: Mapping[str, np.ndarray],
    score: Callable[[Mapping[str, np.ndarray]], Scores],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[Scores, Scores]:
    """The lower and upper ends of 95 % intervals, over images, of every score.

    statistics: of n images, each [n, ...], such as their confusion matrices.
    score: from the sums of the statistics over images to scores by name, such as of `summarize`.

    n images are drawn with replacement, num_resamples times, and the 2.5th and 97.5th percentiles
    taken of the scores of their sums (Efron and Tibshirani 1993, "An introduction to the bootstrap",
    chapter 13). It says how much a score depends on which images were tested, not on the training's
    randomness. Resamples without the class do not count. NaN if there are no others, or one image.
    """
    n = len(next(iter(statistics.values())))
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=num_resamples)
    # In float64, for BLAS: sums of counts are exact up to 2^53.
    sums = {
        name: (draws @ each.reshape(n, -1).astype(np.float64)).reshape(-1, *each.shape[1:])
        for name, each in statistics.items()
    }
    scores = [score({name: each[i] for name, each in sums.items()}) for i in range(num_resamples)]
    low, high = {}, {}
    for name, first in scores[0].items():
        values = np.array([each[name] for each in scores]).reshape(num_resamples, -1)
        ends = np.full((2, values.shape[1]), np.nan)
        some = ~np.all(np.isnan(values), axis=0) & (n > 1)
        ends[:, some] = np.nanpercentile(values[:, some], (2.5, 97.5), axis=0)
        low[name], high[name] = ends[:, 0].tolist() if isinstance(first, float) else ends
    return low, high


def mean_iou_of_each(matrices: np.ndarray) -> Float64[np.ndarray, " n"]:
    """The mean IoU of each image by itself, from matrices [n, c, c]; NaN without a pixel."""
    return np.array([summarize(matrix)["mean_iou"] for matrix in matrices])


def mean(values: PerClass) -> float:
    """Mean without NaN; NaN, silently, if nothing is left."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else math.nan
