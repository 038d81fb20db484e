"""Aggregates the measurements of images into the scores of a split.

Each image is reduced to statistics that can be summed over images: confusion matrices, numerators
and denominators. A split is scored from these sums, which makes bootstrap resampling cheap.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from dense_jax import metrics
from dense_jax.metrics import boundary
from dense_jax.metrics.calibration import ProbabilitySums

Statistics = Mapping[str, np.ndarray]

NUM_RESAMPLES = 1000
CALIBRATED = "calibrated_confusion_matrices"  # those with the thresholds of regions


def image_statistics(measured: Statistics, foreground: Sequence[int] = ()) -> Statistics:
    """Returns {name: statistics [n, ...]} of n images. `score` takes their sums over the images.

    The statistics are confusion matrices for region scores and pairs [numerator, denominator] for
    other scores. For a mean over images, the pair is [value, 1], or [0, 0] if the value is NaN. The
    statistics of probabilities are those of `calibration.ProbabilitySums`.

    measured: The confusion_matrices [n, c, c], or with regions [n, r, 2, 2], and the stacked
      results of `per_image.measure`. With regions, calibrated_confusion_matrices are scored, too.
    foreground: The classes that are also scored as one merged class. May be empty.
    """
    matrices = measured["confusion_matrices"]
    statistics = {"confusion_matrices": matrices}
    summaries = [metrics.summarize(matrix) for matrix in matrices]
    if foreground:
        merge = np.zeros((matrices.shape[1], 2), np.int64)
        merge[:, 0], merge[list(foreground)] = 1, (0, 1)
        statistics["foreground_matrices"] = pairs = merge.T @ matrices @ merge  # [n, 2, 2]
        summaries = [s | _foreground(m) for s, m in zip(summaries, pairs, strict=True)]
    if matrices.ndim == 4 and CALIBRATED in measured:
        statistics[CALIBRATED] = measured[CALIBRATED]
    for name, value in summaries[0].items():
        if isinstance(value, float):
            values = np.array([summary[name] for summary in summaries])
            statistics[f"mean_over_images/{name}"] = _as_mean(values)
    for name, values in measured.items():
        metric = metrics.METRICS.get(name)
        is_sum = name.removeprefix("calibrated_") in ProbabilitySums._fields
        if name == "trimap_iou" or is_sum or (metric and metric.pooled):
            statistics[name] = values
        elif metric:
            statistics[name] = _as_mean(values)
            if metric.image_mean:
                true = metrics.pixel_counts(matrices, matrices.ndim == 4).true
                shown = np.where(true > 0, values, np.nan)
                means = np.array([metrics.mean(image) for image in shown])
                statistics[f"mean_over_images/{metric.score}"] = _as_mean(means)
    return statistics


def add_up(statistics: Statistics) -> Statistics:
    """Returns the sums of the statistics over images. Sums counts in int64."""
    return {
        name: values.sum(axis=0, dtype=np.result_type(values, np.int64))
        for name, values in statistics.items()
    }


def score(sums: Statistics) -> metrics.Scores:
    """Returns all scores of a split by name, given the sums of the statistics over images."""
    scores = metrics.summarize(sums["confusion_matrices"])
    probabilities = {kind: _probability_names(kind) for kind in ("probability", "calibrated")}
    for kind, names in probabilities.items():
        if names[0] in sums:
            parts = ProbabilitySums(*(sums[name] for name in names))
            scores |= metrics.summarize_probabilities(parts, kind)
    done = {"confusion_matrices", *(name for names in probabilities.values() for name in names)}
    for name, total in sums.items():
        if name in done:
            continue
        if name == "foreground_matrices":
            scores |= _foreground(total)
            continue
        if name == CALIBRATED:
            summary = metrics.summarize(total)
            names = ("mean_iou", "mean_dice", "iou", "dice")
            scores |= {f"calibrated_{name}": summary[name] for name in names}
            continue
        with np.errstate(invalid="ignore"):
            ratio = np.asarray(total[..., 0] / total[..., 1])
        if name == "trimap_iou":  # has one mean IoU per band width
            for width, iou in zip(boundary.BAND_WIDTHS, ratio, strict=True):
                scores[f"trimap_mean_iou/{width}"] = metrics.mean(iou)
        elif ratio.ndim:
            scores |= {f"mean_{name}": metrics.mean(ratio), name: ratio}
        else:
            scores[name] = float(ratio)
    return scores


def bootstrap(
    statistics: Statistics, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[metrics.Scores, metrics.Scores]:
    """Returns the lower and upper ends of the 95% confidence intervals of all scores.

    The images are resampled with replacement `num_resamples` times. The ends are the 2.5th and
    97.5th percentiles of the resamples' scores (Efron and Tibshirani 1993, "An introduction to the
    bootstrap", chapter 13). The intervals show how much a score depends on the choice of test
    images, not on the randomness of training. Resamples in which a score is NaN do not count for
    this score. If a score is NaN in all resamples or there is only one image, both ends are NaN.
    """
    low, high = {}, {}
    for name, values in resampled_scores(statistics, num_resamples, seed).items():
        ends = interval(values)
        low[name], high[name] = ends.tolist() if ends.ndim == 1 else ends
    return low, high


def resampled_scores(
    statistics: Statistics, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns {name: the scores of the resamples, [num_resamples, ...]}, NaN for a single image.

    The resamples are the same for all statistics of the same number of images.
    """
    sums = {name: resampled_sums(x, num_resamples, seed) for name, x in statistics.items()}
    resamples = [score({name: x[i] for name, x in sums.items()}) for i in range(num_resamples)]
    scores = {name: np.array([scores[name] for scores in resamples]) for name in resamples[0]}
    is_single = len(statistics["confusion_matrices"]) == 1
    return {name: x * (np.nan if is_single else 1) for name, x in scores.items()}


def resampled_sums(
    values: np.ndarray, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Returns the sums of values [n, ...] over the images of each resample, [num_resamples, ...]."""
    # NumPy uses BLAS for float64, in which sums of counts are exact up to 2^53.
    draws = _draws(len(values), num_resamples, seed)
    return np.tensordot(draws, values.astype(np.float64), axes=1)


@functools.lru_cache(maxsize=1)
def _draws(n: int, num_resamples: int, seed: int) -> np.ndarray:
    """Returns how often each resample has each of n images, float64 [num_resamples, n]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), size=num_resamples).astype(np.float64)


def interval(values: np.ndarray) -> np.ndarray:
    """Returns the 2.5th and 97.5th percentiles over the first axis, [2, ...]. Leaves out NaN."""
    flat = values.reshape(len(values), -1)
    ends = np.full((2, flat.shape[1]), np.nan)
    some = ~np.all(np.isnan(flat), axis=0)
    ends[:, some] = np.nanpercentile(flat[:, some], (2.5, 97.5), axis=0)
    return ends.reshape(2, *values.shape[1:])


def _probability_names(kind: str) -> list[str]:
    """Returns the names of the statistics of a kind, in the order of ProbabilitySums."""
    prefix = "calibrated_" if kind == "calibrated" else ""
    return [f"{prefix}{name}" for name in ProbabilitySums._fields]


def _foreground(matrix: np.ndarray) -> dict[str, float]:
    """Returns the region metrics of class 1 in a 2x2 confusion matrix, named foreground_NAME."""
    summary = metrics.summarize(matrix)
    names = [metric.name for metric in metrics.of_kind("region") if metric.per_class]
    return {f"foreground_{name}": float(np.ravel(summary[name])[1]) for name in names}


def _as_mean(values: np.ndarray) -> np.ndarray:
    return np.stack([np.nan_to_num(values), ~np.isnan(values)], axis=-1)
