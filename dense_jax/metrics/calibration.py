"""Scores of predicted probabilities, from sums over the pixels of a split. NumPy only.

`probabilities.sums` computes the sums on the device. They are added up over tiles and images, and
scored once, so that batch size and number of devices cannot change a score. In the formulas, p[c]
is the probability of class c at a pixel, y its true class, and n the number of valid pixels.

Calibration errors come from reliability histograms, float64 [num_classes + 1, NUM_BINS, 3]. One
histogram per class bins all valid pixels by p[c]; a "hit" is y = c. The last one bins them by their
confidence, max_c p[c]; a hit is a correct prediction. Bin m holds the probabilities in
(m / NUM_BINS, (m + 1) / NUM_BINS]. The three entries are the numbers of pixels and of hits, and the
sum of the probabilities.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Num

NUM_BINS = 15  # as in Guo et al. 2017
TEMPERATURES = np.geomspace(1 / 20, 50, 36)  # those that are tried: neighbors are 22 % apart
THRESHOLDS = np.arange(1, 100) / 100  # those that are tried for regions

Reliability = Float64[np.ndarray, "histograms bins 3"]


class ProbabilitySums(NamedTuple):
    """Sums over valid pixels, float64.

    nll, brier: The sums of -log p[y] and of sum_c (p[c] - (y = c))^2.
    reliability: The histograms.
    """

    nll: Any
    brier: Any
    reliability: Reliability

    @property
    def num_pixels(self) -> np.float64:
        return self.reliability[-1, :, 0].sum()


def errors(reliability: Reliability) -> Float64[np.ndarray, " histograms"]:
    """Returns the expected calibration error of each histogram: sum_m |hits[m] - p[m]| / n.

    The last one is that of the confidence, top-label ECE (Guo et al. 2017, "On calibration of
    modern neural networks", section 2). The others are those of the classes, whose mean is the
    class-wise ECE (Kull et al. 2019, "Beyond temperature scaling", section 2).
    """
    gaps = np.abs(reliability[..., 1] - reliability[..., 2])
    with np.errstate(invalid="ignore"):
        return gaps.sum(axis=-1) / reliability[..., 0].sum(axis=-1)


def best_thresholds(counts: Num[np.ndarray, "r 2 levels"]) -> list[float]:
    """Returns the threshold of each region's highest Dice, given the sums of `by_threshold`.

    This is also the threshold of the highest IoU, because IoU = Dice / (2 - Dice). Of several, it
    is the one closest to 0.5. A region without a pixel gets 0.5.
    """
    outside, inside = np.moveaxis(counts, 1, 0)
    # The numbers of pixels above each threshold, [r, thresholds].
    wrong, right = (np.cumsum(x[:, :0:-1], axis=1)[:, ::-1] for x in (outside, inside))
    dice = 2 * right / np.maximum(right + wrong + inside.sum(axis=1, keepdims=True), 1)
    distance = np.abs(THRESHOLDS - 0.5)
    return [float(THRESHOLDS[np.lexsort((distance, -scores))[0]]) for scores in dice]


def best_temperature(nll: Num[np.ndarray, "*k temperatures"]) -> Float64[np.ndarray, "*k"]:
    """Returns the temperature of the lowest NLL, given the NLL at each of TEMPERATURES.

    Between the temperatures, log T -> NLL is a cubic spline, which is searched in steps of 0.2 %.
    """
    from scipy.interpolate import CubicSpline  # takes as long to import as all the rest

    steps = np.geomspace(TEMPERATURES[0], TEMPERATURES[-1], 100 * (len(TEMPERATURES) - 1) + 1)
    spline = CubicSpline(np.log(TEMPERATURES), nll, axis=-1)
    return np.asarray(steps[np.argmin(spline(np.log(steps)), axis=-1)])
