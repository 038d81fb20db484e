"""Scores that need no network, for comparison with a network's scores. Never imports JAX.

A baseline is a confusion matrix (rows are true classes) over the pixels that the network was scored
on. If class c has the share p[c] of the labels' pixels, they are:

  commonest_class  the prediction is the commonest class of these labels everywhere
  class_prior      each pixel's class is drawn at random with probabilities p. The matrix holds the
                   expected counts n p[i] p[j], so the IoU of class c is p[c] / (2 - p[c])
  threshold        for two classes: one class where the gray level is at least t, the other
                   elsewhere. The level t and the class are those of the highest mean IoU

All three know the labels that they are scored on, so a network that is not above them is poor.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt8

from dense_jax import metrics
from dense_jax.data import Source, levels, verify
from dense_jax.labels import IGNORE_LABEL
from dense_jax.spelling import decimal, some

NUM_LEVELS = 256


def gray_levels(
    image: Shaped[np.ndarray, "h w c"], value_range: Sequence[Any] | None = None
) -> UInt8[np.ndarray, "h w"]:
    """Returns the mean over the channels of the picture of an image; see `levels.picture`."""
    return levels.picture(image, value_range=value_range).mean(axis=-1).astype(np.uint8)


def gray_histogram(source: Source) -> Int64[np.ndarray, "2 256"] | None:
    """Reads all images. Returns the number of valid pixels of each class at each gray level.

    Returns None, without reading images, unless there are two classes, and no regions.
    """
    if source.num_classes != 2 or source.regions:
        return None

    def count(i: int) -> np.ndarray:
        example = source[i]
        label = example["label"].ravel()
        valid = label != IGNORE_LABEL
        cells = label[valid].astype(np.int64) * NUM_LEVELS
        cells += gray_levels(example["image"], source.value_range).ravel()[valid]
        return np.bincount(cells, minlength=2 * NUM_LEVELS)

    histograms, errors = verify.visit(count, len(source), "counting the gray levels of")
    verify.refuse(errors, len(source))
    return np.sum(histograms, axis=0, dtype=np.int64).reshape(2, NUM_LEVELS)


def best_threshold(histogram: Int64[np.ndarray, "2 256"]) -> tuple[int, int, np.ndarray]:
    """Returns the best (threshold, class at and above it, confusion matrix) by mean IoU."""
    total = histogram.sum(axis=1, keepdims=True)
    below = np.cumsum(histogram, axis=1) - histogram  # [:, t]: the pixels below level t
    best, best_iou = (0, 1, total * [0, 1]), -1.0
    for above, columns in ((1, (below, total - below)), (0, (total - below, below))):
        for level, matrix in enumerate(np.stack(columns, axis=1).transpose(2, 0, 1)):
            if (iou := float(metrics.summarize(matrix)["mean_iou"])) > best_iou:
                best, best_iou = (level, above, matrix), iou
    return best


def compare(
    counts: np.ndarray,
    class_names: Sequence[str],
    histogram: Int64[np.ndarray, "2 256"] | None = None,
) -> dict[str, Any]:
    """Compares the confusion matrix of a network with the baselines of the same pixels.

    histogram: The result of `gray_histogram`. If None, there is no threshold.

    Returns {"baselines": {name: {"is": its prediction, "mean_iou": ..., "iou": {class: ...}}},
    "below_baseline": {class: {"iou": ..., "baseline": name}}}. The latter has each class whose IoU
    is lower than that of its best baseline. Both are empty if no pixel is valid, and for regions.
    """
    if counts.ndim == 3:
        return {"baselines": {}, "below_baseline": {}}
    pixels = counts.sum(axis=1, dtype=np.int64)
    if not pixels.any():
        return {"baselines": {}, "below_baseline": {}}
    commonest, shares = int(pixels.argmax()), pixels / pixels.sum()
    is_commonest = np.arange(len(pixels)) == commonest
    predictions = {
        "commonest_class": (f"always {class_names[commonest]}", np.outer(pixels, is_commonest)),
        "class_prior": ("a random guess by the classes' shares", np.outer(pixels, shares)),
    }
    if histogram is not None:
        level, above, matrix = best_threshold(histogram)
        meaning = f"{class_names[above]} from gray level {level} of 255 on"
        predictions["threshold"] = meaning, matrix
    baselines: dict[str, Any] = {}
    for name, (meaning, matrix) in predictions.items():
        scores = metrics.summarize(matrix)
        ious = dict(zip(class_names, np.ravel(scores["iou"]).tolist(), strict=True))
        baselines[name] = {"is": meaning, "mean_iou": scores["mean_iou"], "iou": ious}
    below = {}
    network = np.ravel(metrics.summarize(counts)["iou"]).tolist()
    for name, iou in zip(class_names, network, strict=True):
        rivals = {b: np.nan_to_num(baseline["iou"][name]) for b, baseline in baselines.items()}
        best = max(rivals, key=lambda baseline: rivals[baseline])
        if iou < rivals[best]:
            below[name] = {"iou": iou, "baseline": best}
    return {"baselines": baselines, "below_baseline": below}


def sentences(comparison: Mapping[str, Any]) -> list[str]:
    """Returns what `compare` found, for a reader."""
    baselines = comparison["baselines"]
    listed = [f"{decimal(b['mean_iou'])} ({b['is']})" for b in baselines.values()]
    lines = [f"Mean IoU without a network: {', '.join(listed)}."] if listed else []
    classes = [
        f"{name} ({decimal(found['iou'])}, but "
        f"{decimal(baselines[found['baseline']]['iou'][name])} with "
        f"{baselines[found['baseline']]['is']})"
        for name, found in comparison["below_baseline"].items()
    ]
    if classes:
        lines.append(f"Classes whose IoU is lower than without a network: {some(classes)}.")
    return lines
