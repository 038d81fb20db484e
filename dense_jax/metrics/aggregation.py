"""From what was counted of each image to the scores of a split.

All that is kept of an image can be added up: that makes a mean right whatever an image does not
show, and a bootstrap cheap.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from dense_jax import metrics
from dense_jax.metrics import boundary

MEANS = ("mean_iou", "mean_dice", "mean_accuracy", "pixel_accuracy", "frequency_weighted_iou")
REGION = ("iou", "dice", "accuracy", "precision", "binary_accuracy")
BOUNDARY = ("boundary_f1", "boundary_iou", "hausdorff95", "average_surface_distance")
FOREGROUND = ("iou", "dice", "accuracy", "precision")
OBJECTS = ("rand_score", "information_score")

Tallies = Mapping[str, np.ndarray]


def tally(counted: Mapping[str, np.ndarray], foreground: Sequence[int] = ()) -> Tallies:
    """What `score` needs the sums of, each [n, ...] for n images.

    confusion_matrices, and of every other score [numerator, denominator]: where it is a mean over
    images, an image's value and 1, or 0 and 0 if it has none.

    counted: confusion_matrices [n, c, c] and, if measured, what `per_image.measure` returns.
    foreground: classes to score as one against all others.
    """
    matrices = counted["confusion_matrices"]
    of_images = [metrics.summarize(matrix) for matrix in matrices]
    tallies = {"confusion_matrices": matrices}
    for name in MEANS:
        tallies[f"mean_over_images/{name}"] = _mean_of(
            np.array([image[name] for image in of_images])
        )
    if foreground:
        rows = matrices[:, list(foreground)]
        hit = rows[:, :, list(foreground)].sum(axis=(1, 2), dtype=np.int64)
        true = rows.sum(axis=(1, 2), dtype=np.int64)
        guessed = matrices[:, :, list(foreground)].sum(axis=(1, 2), dtype=np.int64)
        for name, part, whole in zip(
            FOREGROUND,
            (hit, 2 * hit, hit, hit),
            (true + guessed - hit, true + guessed, true, guessed),
            strict=True,
        ):
            tallies[f"foreground_{name}"] = np.stack([part, whole], axis=-1)
            tallies[f"mean_over_images/foreground_{name}"] = _mean_of(_ratio(part, whole))
    for name, values in counted.items():
        if name in ("boundary_iou", "trimap_iou"):
            tallies[name] = values
        elif name in BOUNDARY + OBJECTS:
            tallies[name] = _mean_of(values)
    if "boundary_f1" in counted:
        # BF of SegNet's tables: of each image, the mean over the classes that its label shows.
        shown = np.where(matrices.any(axis=2), counted["boundary_f1"], np.nan)
        tallies["mean_over_images/mean_boundary_f1"] = _mean_of(
            np.array([metrics.mean(image) for image in shown])
        )
    return tallies


def total(tallies: Tallies) -> Tallies:
    """The sums over images; counts in int64."""
    return {
        name: each.sum(axis=0, dtype=np.result_type(each, np.int64))
        for name, each in tallies.items()
    }


def score(totals: Tallies) -> metrics.Scores:
    """Every score of a split, by name: of `metrics.summarize`, and of each other tally."""
    scores = metrics.summarize(totals["confusion_matrices"])
    for name, each in totals.items():
        if name == "confusion_matrices":
            continue
        ratio = _ratio(each[..., 0], each[..., 1])
        if name == "trimap_iou":
            for width, iou in zip(boundary.BAND_WIDTHS, ratio, strict=True):
                scores[f"trimap_mean_iou/{width}"] = metrics.mean(iou)
        elif name in BOUNDARY:
            scores |= {f"mean_{name}": metrics.mean(ratio), name: ratio}
        else:
            scores[name] = float(ratio)
    return scores


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.asarray(numerator / denominator)


def _mean_of(values: np.ndarray) -> np.ndarray:
    return np.stack([np.nan_to_num(values), ~np.isnan(values)], axis=-1)
