"""Boundary metrics for the class maps of one image, in NumPy.

Each metric takes a `MapPair` and returns float64 values per class. This module never imports jax,
because worker processes run it.

A pixel is ignored if its label is IGNORE_LABEL or any other number outside [0, num_classes). An
ignored pixel is not counted and, except in `trimap_iou`, creates no boundary. A class without a
boundary in either map has the score NaN. A class with a boundary in only one map has the worst
score, so that a missed object never scores better than a badly segmented object.
"""

import functools
import math
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Bool, Float64, Int16, Integer, UInt8

from dense_jax.labels import IGNORE_LABEL

ClassMap = Integer[np.ndarray, "..."]  # [h, w]; any other shape raises ValueError
PerClass = Float64[np.ndarray, " c"]
Overlap = Float64[np.ndarray, "c 2"]  # number of pixels in the intersection and in the union
Distances = Float64[np.ndarray, " _"]  # pixels
Side = Int16[np.ndarray, "h w"]  # class, _VOID if ignored, or num_classes if not a class

TOLERANCE = 0.0075  # fraction of the image diagonal
RIM_WIDTH = 0.02  # fraction of the image diagonal
BAND_WIDTHS = (1, 2, 4, 8, 16)  # pixels on either side of a boundary
_VOID = -1
_BEYOND = np.iinfo(np.int16).max  # outside the image
_NEIGHBORS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)


class MapPair:
    """The predicted and true class maps of one image, and the distances between their boundaries.

    num_classes: The number of classes. If None, it is the largest class in the maps plus one.
    """

    def __init__(self, prediction: ClassMap, label: ClassMap, num_classes: int | None = None):
        if prediction.shape != label.shape or label.ndim != 2:
            raise ValueError(
                f"class maps are both [h, w], not {prediction.shape} and {label.shape}"
            )
        valid = (label >= 0) & (label != IGNORE_LABEL)
        if num_classes is None:
            num_classes = 1 + max(int(x[valid].max(initial=0)) for x in (prediction, label))
        if num_classes > IGNORE_LABEL:
            raise ValueError(f"num_classes must be at most {IGNORE_LABEL}, not {num_classes}")
        valid &= label < num_classes
        known = valid & (prediction >= 0) & (prediction < num_classes)
        self.num_classes = num_classes
        self.diagonal = math.hypot(*label.shape)  # pixels
        self.guess: Side
        self.truth: Side
        self.guess, self.truth = np.full((2, *label.shape), _VOID, np.int16)
        self.guess[valid] = num_classes
        self.guess[known], self.truth[valid] = prediction[known], label[valid]

    @functools.cached_property
    def distances(self) -> dict[int, tuple[Distances, Distances]]:
        """Returns {class: (forth, back)}, the distances in pixels between the maps' boundaries.

        `forth` holds the distance from each boundary pixel of the prediction to the boundary of the
        label. `back` holds the distance from each boundary pixel of the label to the boundary of
        the prediction. If only one map has a boundary, all distances are the image diagonal. If
        neither map has a boundary, the class has no entry.
        """
        points = []
        for side in (self.guess, self.truth):
            at = np.argwhere(_is_near_another(side, _NEIGHBORS))
            classes = side[tuple(at.T)]
            points.append([at[classes == c] for c in range(self.num_classes)])
        return {
            c: (self._nearest(start, goal), self._nearest(goal, start))
            for c, (start, goal) in enumerate(zip(*points, strict=True))
            if start.size or goal.size
        }

    def _nearest(self, start: np.ndarray, goal: np.ndarray) -> Distances:
        if not start.size or not goal.size:
            return np.full(len(start), self.diagonal)
        from scipy.spatial import KDTree  # slow to import, and training does not need it

        # A search tree of the few boundary pixels is much faster than one distance transform of the
        # whole image per class and map.
        tree = KDTree(goal, leafsize=20, balanced_tree=False, compact_nodes=False)
        return np.asarray(tree.query(start)[0])

    def per_class(self, score: Callable[[Distances, Distances], float]) -> PerClass:
        """Returns score(forth, back) for each class, or NaN for a class without a boundary."""
        scores = np.full(self.num_classes, np.nan)
        for c, (forth, back) in self.distances.items():
            scores[c] = score(forth, back)
        return scores


def boundary_f1(maps: MapPair, tolerance: float = TOLERANCE) -> PerClass:
    """Returns the F1 score of the boundary pixels of each class, in [0, 1].

    Precision is the fraction of the prediction's boundary pixels that are at most `tolerance` (a
    fraction of the image diagonal) from the label's boundary. For recall, the two maps are swapped
    (Csurka et al. 2013, "What is a good evaluation measure for semantic segmentation?", section
    2.3). A pixel is on the boundary of its class if a 4-neighbor belongs to another class or is
    outside the image. An ignored neighbor creates no boundary. The score is 0 for a class with a
    boundary in only one map.
    """
    reach = tolerance * maps.diagonal

    def f1(forth: Distances, back: Distances) -> float:
        if not forth.size or not back.size:
            return 0.0
        precision, recall = np.mean(forth <= reach), np.mean(back <= reach)
        return float(2 * precision * recall / max(precision + recall, 1e-12))

    return maps.per_class(f1)


def hausdorff95(maps: MapPair) -> PerClass:
    """Returns the 95th percentile of the distance between boundaries, in pixels, per class.

    The percentile is computed from prediction to label and from label to prediction, and the larger
    value is returned. (Some tools pool both directions, which gives a smaller value.) Boundaries
    are defined in `boundary_f1`. For a class with a boundary in only one map, the result is the
    image diagonal.
    """
    return maps.per_class(
        lambda forth, back: max(float(np.percentile(d, 95)) for d in (forth, back) if d.size)
    )


def average_surface_distance(maps: MapPair) -> PerClass:
    """Returns the average symmetric surface distance (ASSD), in pixels, per class.

    The ASSD is the mean distance from a boundary pixel of either map to the other map's boundary.
    Boundaries are defined in `boundary_f1`. For a class with a boundary in only one map, the result
    is the image diagonal.
    """
    return maps.per_class(lambda forth, back: float(np.mean(np.concatenate([forth, back]))))


def boundary_iou(maps: MapPair, width: float = RIM_WIDTH) -> Overlap:
    """Returns the numerator and denominator of each class's boundary IoU, in pixels.

    The boundary IoU is the IoU of the predicted and true rims of a class (Cheng et al. 2021,
    "Boundary IoU", section 4, and the authors' code). The rim consists of the pixels of the class
    that have a valid pixel of another class, or the outside of the image, within a Chebyshev
    distance of max(1, round(width * diagonal)) pixels.
    """
    reach = max(1, round(width * maps.diagonal))
    square = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    guess, truth = (
        np.where(_is_near_another(side, square), side, _VOID) for side in (maps.guess, maps.truth)
    )
    return _overlap(guess, truth, maps.num_classes)[0]


def trimap_iou(maps: MapPair) -> Float64[np.ndarray, "bands c 2"]:
    """Returns the numerator and denominator of each class's IoU in bands around label boundaries.

    Each width in BAND_WIDTHS defines a band (Kohli et al. 2009, "Robust higher order potentials for
    enforcing label consistency"). A band contains the pixels whose Chebyshev distance to a boundary
    pixel is less than the width. A boundary pixel has a 4-neighbor with another label. Ignored
    neighbors also create a boundary, because some datasets draw boundaries as ignored pixels.
    """
    guess, truth = maps.guess, maps.truth
    same = cv2.dilate(truth, _NEIGHBORS) == cv2.erode(truth, _NEIGHBORS)
    distance = cv2.distanceTransform(same.astype(np.uint8), cv2.DIST_C, 3)
    near = distance < max(BAND_WIDTHS)
    # Count each pixel once, in the narrowest band that contains it. `cumsum` completes wider bands.
    narrowest = np.searchsorted(BAND_WIDTHS, np.arange(max(BAND_WIDTHS)), side="right")
    band = narrowest[distance[near].astype(np.uint8)]
    in_bands = _overlap(guess[near], truth[near], maps.num_classes, band, len(BAND_WIDTHS))
    return np.cumsum(in_bands, axis=0)


def _is_near_another(side: Side, around: UInt8[np.ndarray, "k k"]) -> Bool[np.ndarray, "h w"]:
    """Returns a mask of the pixels whose neighborhood contains another class or leaves the image.

    around: The shape of the neighborhood, as a mask whose center is the pixel.
    """
    highest = cv2.dilate(side, around, borderType=cv2.BORDER_CONSTANT, borderValue=[_BEYOND])
    lowest = cv2.erode(np.where(side == _VOID, np.int16(_BEYOND), side), around)
    return (highest != side) | (lowest != side)


def _overlap(
    guess: Int16[np.ndarray, "*d"],
    truth: Int16[np.ndarray, "*d"],
    num_classes: int,
    band: Integer[np.ndarray, "*d"] | int = 0,
    num_bands: int = 1,
) -> Float64[np.ndarray, "bands c 2"]:
    """Counts the pixels in the intersection and the union of two maps, per band and class."""
    n = num_classes + 2  # _VOID, the classes, and num_classes
    pair = (np.int32(band) * n + guess + 1) * n + truth + 1
    counts = np.bincount(pair.ravel(), minlength=num_bands * n * n).reshape(num_bands, n, n)
    both = np.diagonal(counts, axis1=1, axis2=2)
    either = counts.sum(axis=1) + counts.sum(axis=2) - both
    return np.stack([both, either], axis=-1)[:, 1:-1].astype(np.float64)
