"""Confidence intervals over seeds or folds, and paired tests between two rows."""

import math
from collections.abc import Sequence

import numpy as np
import scipy.stats


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of n values and the half width of an interval around it.

    For n > 2, it is the 95% t-interval, with the half width t(0.975, n - 1) * s / sqrt(n), where s
    is the sample standard deviation. For n = 2, where the t-interval is 13 times as wide as the
    distance of the values, the interval ends at the two values. For n = 1, the half width is NaN.
    """
    n = len(values)
    if n == 1:
        return float(values[0]), math.nan
    if n == 2:
        return float(np.mean(values)), abs(values[0] - values[1]) / 2
    t = scipy.stats.t.ppf(0.975, n - 1)
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / math.sqrt(n))


def paired_p_value(values: Sequence[float], others: Sequence[float]) -> float:
    """Returns the two-sided p-value of the paired t-test.

    The statistic is t = mean(d) / (s / sqrt(n)), where d = values - others has length n and
    s is the sample standard deviation of d. If n < 2, returns NaN. If s is 0 up to rounding errors,
    t is undefined. The p-value is then 1 for mean(d) = 0, and 0 for any other mean.
    """
    if len(values) < 2:
        return math.nan
    differences = np.subtract(values, others)
    rounding = 1e-12 * max(np.max(np.abs(values)), np.max(np.abs(others)))
    if np.ptp(differences) <= rounding:
        return float(np.max(np.abs(differences)) <= rounding)
    return float(scipy.stats.ttest_rel(values, others).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values of m tests, corrected with Holm's method.

    If p_1 <= ... <= p_m, the corrected p_i is the maximum of min(1, (m - j + 1) * p_j) over j <= i
    (Holm 1979, "A simple sequentially rejective multiple test procedure"). NaN stays NaN and is not
    counted in m.
    """
    p = np.array(p_values, np.float64)
    tested = np.flatnonzero(~np.isnan(p))
    ascending = tested[np.argsort(p[tested], kind="stable")]
    factors = np.arange(len(ascending), 0, -1)
    p[ascending] = np.maximum.accumulate(np.minimum(1, factors * p[ascending]))
    return p.tolist()
