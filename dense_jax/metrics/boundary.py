"""How well contours are drawn: boundary metrics of one image, in numpy.

Each takes a `MapPair`, the class maps of an image, and returns float64 values per class. Never uses
jax: worker processes run this.

A pixel labeled IGNORE_LABEL, or anything else outside [0, num_classes), counts nowhere and makes
no boundary. A class with a boundary in neither map has no score: NaN. With a boundary in one map
only it has the worst score, so that missing an object is never better than drawing it badly.
"""

import functools
import math
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Bool, Float64, Int16, Integer, UInt8
from scipy.spatial import KDTree

from dense_jax.labels import IGNORE_LABEL

ClassMap = Integer[np.ndarray, "..."]  # [h, w]; any other shape is a ValueError
PerClass = Float64[np.ndarray, " c"]
Overlap = Float64[np.ndarray, "c 2"]  # pixels in the intersection and in the union
Distances = Float64[np.ndarray, " _"]  # pixels
Side = Int16[np.ndarray, "h w"]  # classes; _VOID where ignored, num_classes where no class

TOLERANCE = 0.0075  # fraction of the diagonal
RIM_WIDTH = 0.02  # fraction of the diagonal
BAND_WIDTHS = (1, 2, 4, 8, 16)  # pixels on either side of a boundary
_VOID = -1
_BEYOND = np.iinfo(np.int16).max  # outside the image
_NEIGHBORS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)


class MapPair:
    """The class maps of one image, and the distances between their boundaries.

    num_classes: by default one more than the largest class in the maps.
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
        """Class -> (forth, back), for the classes with a boundary in either map.

        forth holds the distance from each boundary pixel of the prediction to the label's boundary,
        back the reverse; the image's diagonal where there is no boundary to reach.
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
        # A search tree of the few boundary pixels is much faster than distance transforms of the
        # whole image, one per class and side.
        tree = KDTree(goal, leafsize=20, balanced_tree=False, compact_nodes=False)
        return np.asarray(tree.query(start)[0])

    def per_class(self, score: Callable[[Distances, Distances], float]) -> PerClass:
        """Returns score(forth, back) of each class; NaN for a class without a boundary."""
        scores = np.full(self.num_classes, np.nan)
        for c, (forth, back) in self.distances.items():
            scores[c] = score(forth, back)
        return scores


def boundary_f1(maps: MapPair, tolerance: float = TOLERANCE) -> PerClass:
    """F1 of boundary pixels that lie within a distance of the other side's boundary, in [0, 1].

    Precision is the fraction of the prediction's boundary pixels at most `tolerance` (a fraction of
    the image's diagonal) from the label's boundary, recall the reverse, per class (Csurka et al.
    2013, "What is a good evaluation measure for semantic segmentation?", section 2.3). A pixel is a
    boundary pixel of its class if one of its 4 neighbors is of another class or outside the image;
    an ignored neighbor makes no boundary. 0 for a class with a boundary on one side only.
    """
    reach = tolerance * maps.diagonal

    def f1(forth: Distances, back: Distances) -> float:
        if not forth.size or not back.size:
            return 0.0
        precision, recall = np.mean(forth <= reach), np.mean(back <= reach)
        return float(2 * precision * recall / max(precision + recall, 1e-12))

    return maps.per_class(f1)


def hausdorff95(maps: MapPair) -> PerClass:
    """95th percentile of the distance between boundaries, in pixels.

    The larger of the two directions' percentiles, prediction to label and label to prediction
    (some tools take one percentile of both together, which is smaller). Boundaries are those of
    `boundary_f1`. The diagonal of the image for a class with a boundary on one side only.
    """
    return maps.per_class(
        lambda forth, back: max(float(np.percentile(d, 95)) for d in (forth, back) if d.size)
    )


def average_surface_distance(maps: MapPair) -> PerClass:
    """Mean distance between boundaries, in pixels: average symmetric surface distance (ASSD).

    The mean over the boundary pixels of both sides together of the distance to the other side's
    boundary. Boundaries, and classes missing on one side, are as in `hausdorff95`.
    """
    return maps.per_class(lambda forth, back: float(np.mean(np.concatenate([forth, back]))))


def boundary_iou(maps: MapPair, width: float = RIM_WIDTH) -> Overlap:
    """The pixels in the rims of both masks and in either; their ratio is the boundary IoU.

    The rim of a mask holds its pixels that are at most max(1, round(width * diagonal)) pixels, along
    rows, columns or diagonals, from a valid pixel outside the mask or from outside the image (Cheng
    et al. 2021, "Boundary IoU", section 4, and their code).
    """
    reach = max(1, round(width * maps.diagonal))
    square = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    guess, truth = (
        np.where(_is_near_another(side, square), side, _VOID) for side in (maps.guess, maps.truth)
    )
    return _overlap(guess, truth, maps.num_classes)[0]


def trimap_iou(maps: MapPair) -> Float64[np.ndarray, "bands c 2"]:
    """The intersection and the union of the masks near the label's boundaries, in pixels.

    A band has the pixels closer than one of BAND_WIDTHS (along rows, columns or diagonals) to a pixel
    with a 4-neighbor of another label. Here an ignored neighbor does make a boundary, since some
    datasets draw boundaries as ignored (Kohli et al. 2009, "Robust higher order potentials for
    enforcing label consistency").
    """
    guess, truth = maps.guess, maps.truth
    same = cv2.dilate(truth, _NEIGHBORS) == cv2.erode(truth, _NEIGHBORS)
    distance = cv2.distanceTransform(same.astype(np.uint8), cv2.DIST_C, 3)
    near = distance < max(BAND_WIDTHS)
    # Each pixel is counted once, in the narrowest band that holds it; wider bands add those up.
    narrowest = np.searchsorted(BAND_WIDTHS, np.arange(max(BAND_WIDTHS)), side="right")
    band = narrowest[distance[near].astype(np.uint8)]
    in_bands = _overlap(guess[near], truth[near], maps.num_classes, band, len(BAND_WIDTHS))
    return np.cumsum(in_bands, axis=0)


def _is_near_another(side: Side, around: UInt8[np.ndarray, "k k"]) -> Bool[np.ndarray, "h w"]:
    """Returns whether another class, or the outside of the image, is where `around` is not 0."""
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
    """Returns per band and class the pixels in the intersection and in the union of two maps."""
    n = num_classes + 2  # _VOID comes first, no class last
    pair = (np.int32(band) * n + guess + 1) * n + truth + 1
    counts = np.bincount(pair.ravel(), minlength=num_bands * n * n).reshape(num_bands, n, n)
    both = np.diagonal(counts, axis1=1, axis2=2)
    either = counts.sum(axis=1) + counts.sum(axis=2) - both
    return np.stack([both, either], axis=-1)[:, 1:-1].astype(np.float64)
