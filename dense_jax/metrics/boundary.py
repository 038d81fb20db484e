"""How well contours are drawn: boundary metrics of one image, in numpy.

All take class maps [h, w], prediction and label, and return one float64 per class; `statistics` has
all of them at once. Never uses jax: worker processes run this.

A pixel labeled IGNORE_LABEL, or anything else outside [0, num_classes), counts nowhere and makes
no boundary. A class with a boundary in neither map has no score: NaN. With a boundary in one map
only it has the worst score, so that missing an object is never better than drawing it badly.
"""

import functools
import math
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from jaxtyping import Bool, Float64, Int16, Integer, UInt8
from scipy.spatial import KDTree

from dense_jax.labels import IGNORE_LABEL

ClassMap = Integer[np.ndarray, "..."]  # [h, w]; what is not is a ValueError
PerClass = Float64[np.ndarray, " c"]
Overlap = Float64[np.ndarray, "c 2"]  # pixels in the intersection and in the union
Distances = Float64[np.ndarray, " _"]  # pixels
Side = Int16[np.ndarray, "h w"]  # classes; _VOID where ignored, num_classes for none of them

TOLERANCE = 0.0075  # of the diagonal
RIM_WIDTH = 0.02  # of the diagonal
BAND_WIDTHS = (1, 2, 4, 8, 16)  # pixels on either side of a boundary
_VOID = -1
_BEYOND = np.iinfo(np.int16).max  # the image's end
_NEIGHBOURS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)


def boundary_f1(
    prediction: ClassMap,
    label: ClassMap,
    *,
    num_classes: int | None = None,
    tolerance: float = TOLERANCE,
) -> PerClass:
    """F1 of boundary pixels that lie within a distance of the other side's boundary, in [0, 1].

    Precision is the fraction of the prediction's boundary pixels at most `tolerance` (a fraction of
    the image's diagonal) from the label's boundary, recall the reverse, per class (Csurka et al.
    2013, "What is a good evaluation measure for semantic segmentation?", section 2.3). A boundary
    pixel belongs to the class and one of its 4 neighbors does not, or lies beyond the image; an
    ignored neighbor makes no boundary.

    0 for a class with a boundary on one side only, NaN for none. `num_classes`, here and below,
    is one more than the largest class seen if not given.
    """
    reach = tolerance * _diagonal(label)
    return _per_class(functools.partial(_f1, reach=reach), prediction, label, num_classes)


def hausdorff95(
    prediction: ClassMap, label: ClassMap, *, num_classes: int | None = None
) -> PerClass:
    """95th percentile of the distance between boundaries, in pixels.

    The larger of the two directions' percentiles, prediction to label and label to prediction
    (some tools take one percentile of both together, which is smaller). Boundaries are those of
    `boundary_f1`. The diagonal of the image for a class with a boundary on one side only; NaN for
    none.
    """
    return _per_class(_hausdorff95, prediction, label, num_classes)


def average_surface_distance(
    prediction: ClassMap, label: ClassMap, *, num_classes: int | None = None
) -> PerClass:
    """Mean distance between boundaries, in pixels: average symmetric surface distance (ASSD).

    The mean over the boundary pixels of both sides together of the distance to the other side's
    boundary. Boundaries, and classes missing on one side or both, as in `hausdorff95`.
    """
    return _per_class(_average_distance, prediction, label, num_classes)


def boundary_iou(
    prediction: ClassMap,
    label: ClassMap,
    *,
    num_classes: int | None = None,
    width: float = RIM_WIDTH,
) -> PerClass:
    """IoU of only those pixels of each mask that are near its own boundary, in [0, 1].

    Near is at most max(1, round(width * diagonal)) pixels, along rows, columns or diagonals, from a
    valid pixel outside the mask or from beyond the image (Cheng et al. 2021, "Boundary IoU",
    section 4, and their code). 0 for a class that is missing on one side, NaN for none.
    """
    overlap = _rim_overlap(*_sides(prediction, label, num_classes), width)
    with np.errstate(invalid="ignore"):
        return overlap[:, 0] / overlap[:, 1]


def statistics(
    prediction: ClassMap, label: ClassMap, num_classes: int
) -> dict[str, Float64[np.ndarray, "..."]]:
    """All boundary metrics of one image, at half the cost of one after the other.

    boundary_f1, hausdorff95, average_surface_distance: as of these functions, [c].
    boundary_iou [c, 2]: the pixels in both rims, and in either, of which `boundary_iou` is the ratio.
    trimap_iou [bands, c, 2]: intersection and union of the masks, but only of the pixels closer than
      BAND_WIDTHS pixels (along rows, columns or diagonals) to one with a 4-neighbor of another
      label. Here an ignored neighbor does make a boundary, since some datasets draw boundaries as
      ignored (Kohli et al. 2009, "Robust higher order potentials for enforcing label consistency").
    """
    guess, truth, _ = _sides(prediction, label, num_classes)
    reach = TOLERANCE * _diagonal(label)
    f1, hausdorff, average = np.full((3, num_classes), np.nan)
    for c, forth, back in _distances(guess, truth, num_classes):
        f1[c] = _f1(forth, back, reach)
        hausdorff[c] = _hausdorff95(forth, back)
        average[c] = _average_distance(forth, back)
    return {
        "boundary_f1": f1,
        "hausdorff95": hausdorff,
        "average_surface_distance": average,
        "boundary_iou": _rim_overlap(guess, truth, num_classes, RIM_WIDTH),
        "trimap_iou": _band_overlap(guess, truth, num_classes),
    }


def _sides(
    prediction: ClassMap, label: ClassMap, num_classes: int | None
) -> tuple[Side, Side, int]:
    """The two class maps with _VOID where nothing counts, and the number of classes."""
    if prediction.shape != label.shape or label.ndim != 2:
        raise ValueError(f"class maps are both [h, w], not {prediction.shape} and {label.shape}")
    valid = (label >= 0) & (label != IGNORE_LABEL)
    if num_classes is None:
        num_classes = 1 + max(int(x[valid].max(initial=0)) for x in (prediction, label))
    if num_classes > IGNORE_LABEL:
        raise ValueError(f"num_classes must be at most {IGNORE_LABEL}, not {num_classes}")
    valid &= label < num_classes
    guess, truth = np.full((2, *label.shape), _VOID, np.int16)
    guess[valid] = num_classes
    known = valid & (prediction >= 0) & (prediction < num_classes)
    guess[known], truth[valid] = prediction[known], label[valid]
    return guess, truth, num_classes


def _distances(
    guess: Side, truth: Side, num_classes: int
) -> Iterator[tuple[int, Distances, Distances]]:
    """(class, forth, back) for the classes with a boundary on either side, in pixels.

    forth holds the distance from each boundary pixel of the prediction to the label's boundary, back
    the reverse; the image's diagonal where there is no boundary to reach.
    """
    points = []
    for side in (guess, truth):
        at = np.argwhere(_is_near_another(side, _NEIGHBOURS))
        of_class = side[tuple(at.T)]
        points.append([at[of_class == c] for c in range(num_classes)])
    # A search tree of the few boundary pixels: much faster than distance transforms of the whole
    # image, one per class and side.
    for c, (start, goal) in enumerate(zip(*points, strict=True)):
        if start.size or goal.size:
            yield c, _nearest(start, goal, guess.shape), _nearest(goal, start, guess.shape)


def _nearest(start: np.ndarray, goal: np.ndarray, shape: tuple[int, ...]) -> Distances:
    if not start.size or not goal.size:
        return np.full(len(start), math.hypot(*shape))
    tree = KDTree(goal, leafsize=20, balanced_tree=False, compact_nodes=False)
    return np.asarray(tree.query(start)[0])


def _per_class(
    score: Callable[[Distances, Distances], float],
    prediction: ClassMap,
    label: ClassMap,
    num_classes: int | None,
) -> PerClass:
    guess, truth, num_classes = _sides(prediction, label, num_classes)
    scores = np.full(num_classes, np.nan)
    for c, forth, back in _distances(guess, truth, num_classes):
        scores[c] = score(forth, back)
    return scores


def _f1(forth: Distances, back: Distances, reach: float) -> float:
    if not forth.size or not back.size:
        return 0.0
    precision, recall = np.mean(forth <= reach), np.mean(back <= reach)
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def _hausdorff95(forth: Distances, back: Distances) -> float:
    return max(float(np.percentile(d, 95)) for d in (forth, back) if d.size)


def _average_distance(forth: Distances, back: Distances) -> float:
    return float(np.mean(np.concatenate([forth, back])))


def _rim_overlap(guess: Side, truth: Side, num_classes: int, width: float) -> Overlap:
    """Per class, the number of pixels in the rims of both masks and of either."""
    reach = max(1, round(width * _diagonal(guess)))
    square = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    guess_rim, truth_rim = (
        np.where(_is_near_another(side, square), side, _VOID) for side in (guess, truth)
    )
    return _overlap(guess_rim, truth_rim, num_classes)[0]


def _is_near_another(side: Side, around: UInt8[np.ndarray, "k k"]) -> Bool[np.ndarray, "h w"]:
    """Whether another class, or the image's end, is where `around` a pixel is not 0."""
    highest = cv2.dilate(side, around, borderType=cv2.BORDER_CONSTANT, borderValue=[_BEYOND])
    lowest = cv2.erode(np.where(side == _VOID, np.int16(_BEYOND), side), around)
    return (highest != side) | (lowest != side)


def _band_overlap(guess: Side, truth: Side, num_classes: int) -> Float64[np.ndarray, "bands c 2"]:
    """Per band and class, intersection and union of the pixels near the label's boundaries."""
    same = cv2.dilate(truth, _NEIGHBOURS) == cv2.erode(truth, _NEIGHBOURS)
    distance = cv2.distanceTransform(same.astype(np.uint8), cv2.DIST_C, 3)
    near = distance < max(BAND_WIDTHS)
    # Each pixel is counted once, in the narrowest band that holds it; wider bands add those up.
    narrowest = np.searchsorted(BAND_WIDTHS, np.arange(max(BAND_WIDTHS)), side="right")
    band = narrowest[distance[near].astype(np.uint8)]
    in_bands = _overlap(guess[near], truth[near], num_classes, band, len(BAND_WIDTHS))
    return np.cumsum(in_bands, axis=0)


def _overlap(
    guess: Int16[np.ndarray, "*d"],
    truth: Int16[np.ndarray, "*d"],
    num_classes: int,
    band: Integer[np.ndarray, "*d"] | int = 0,
    num_bands: int = 1,
) -> Float64[np.ndarray, "bands c 2"]:
    """Per band and class, the pixels in the intersection and in the union of two maps."""
    n = num_classes + 2  # _VOID comes first, none of the classes last
    pair = (np.int32(band) * n + guess + 1) * n + truth + 1
    counts = np.bincount(pair.ravel(), minlength=num_bands * n * n).reshape(num_bands, n, n)
    both = np.diagonal(counts, axis1=1, axis2=2)
    either = counts.sum(axis=1) + counts.sum(axis=2) - both
    return np.stack([both, either], axis=-1)[:, 1:-1].astype(np.float64)


def _diagonal(label: ClassMap) -> float:
    return math.hypot(*label.shape)
