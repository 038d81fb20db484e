"""Intervals over seeds, and paired tests of one row against another."""

import math
from collections.abc import Sequence

import numpy as np
import scipy.stats


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns mean and half width: t(0.975, n - 1) * s / sqrt(n), s with n - 1; NaN for n = 1."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    t = scipy.stats.t.ppf(0.975, n - 1)
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / math.sqrt(n))


def paired_p_value(values: Sequence[float], others: Sequence[float]) -> float:
    """Returns the two-sided p of the paired t-test: t = mean(d) / (s / sqrt(n)), d the differences.

    NaN for fewer than two pairs. If all d are equal, s = 0, p is its limit: 1 for no difference and
    0 for any other. (Differences that only rounding tells apart are equal.)
    """
    if len(values) < 2:
        return math.nan
    differences = np.subtract(values, others)
    rounding = 1e-12 * max(np.max(np.abs(values)), np.max(np.abs(others)))
    if np.ptp(differences) <= rounding:
        return float(np.max(np.abs(differences)) <= rounding)
    return float(scipy.stats.ttest_rel(values, others).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects the p-values of m tests, so that the chance of any false alarm stays at the level.

    The i-th smallest becomes max over j <= i of min(1, (m - j + 1) p_j) (Holm 1979, "A simple
    sequentially rejective multiple test procedure"). NaN is no test: it stays, and does not count.
    """
    p = np.array(p_values, np.float64)
    tested = np.flatnonzero(~np.isnan(p))
    ascending = tested[np.argsort(p[tested], kind="stable")]
    factors = np.arange(len(ascending), 0, -1)
    p[ascending] = np.maximum.accumulate(np.minimum(1, factors * p[ascending]))
    return p.tolist()
