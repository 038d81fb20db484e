"""Tests how the mean IoU of two rows differs over the images of a split.

Here the trained networks are fixed and the images are random. `statistics.paired_p_value` treats
the images as fixed and the seeds as random. The score of a row is the one in the report's table:
the mean IoU over all pixels of the split, averaged over the seeds. If the runs were scored on their
held-out folds, the split is all folds together: each image as predicted by the network that was not
trained on it. The table then has the mean over folds, which may differ a little.

Each row is given by its counts, a float64 array [n, 3, s, c]. They are the numbers of correctly
predicted, predicted and true pixels of each of c classes in each of n images, for each of s seeds.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from dense_jax import metrics
from dense_jax.metrics import aggregation
from dense_jax.report.reading import RunFolder
from dense_jax.report.statistics import holm

Counts = Float64[np.ndarray, "n 3 s c"]

NUM_DRAWS = 10_000


class ImageTest(NamedTuple):
    """The difference between a row's mean IoU and the baseline's, over the images of a split."""

    difference: float = math.nan
    low: float = math.nan  # the ends of the 95% interval of the difference
    high: float = math.nan
    p_value: float = math.nan
    num_images: int = 0
    num_seeds: int = 0  # the number of seeds that both rows have
    refusal: str = ""  # if there is no test, says why


class _Images(NamedTuple):
    """The counts of an evaluation in each image of its split, sorted by the names of the images."""

    run: RunFolder
    names: list[str]
    counts: Float64[np.ndarray, "n 3 c"]


Key = tuple[str, int | None]  # seed and fold


def compare(baseline: Sequence[RunFolder], rows: Sequence[Sequence[RunFolder]]) -> list[ImageTest]:
    """Tests each row against the baseline. Holm's method corrects for the number of tested rows.

    The rows are given by their evaluated runs. Only seeds that both rows have are compared.
    """
    theirs = _read(baseline)
    tests = [_compare(_read(runs), theirs) for runs in rows]
    p_values = holm([test.p_value for test in tests])
    return [test._replace(p_value=p) for test, p in zip(tests, p_values, strict=True)]


def _read(runs: Sequence[RunFolder]) -> dict[Key, _Images]:
    """Returns what each run found. A run has no images if its .npz file is not valid."""
    found = {}
    for run in runs:
        names, matrices = run.images() or ((), np.zeros((0, 1, 1)))
        pixels = metrics.pixel_counts(matrices, matrices.ndim == 4)
        counts = np.stack([pixels.hit, pixels.predicted, pixels.true], axis=1).astype(np.float64)
        order = sorted(range(len(names)), key=names.__getitem__)
        key = str(run.fields.get("seed")), run.fold
        found[key] = _Images(run, [names[i] for i in order], counts[order])
    return found


def _join_folds(runs: dict[Key, _Images]) -> list[_Images]:
    """Joins what one seed's runs found in their held-out folds. Leaves other runs as they are."""
    joined: dict[Key, list[_Images]] = {}
    for (seed, fold), found in sorted(runs.items(), key=lambda item: item[0][1] or 0):
        key = seed, fold if found.run.scored_fold is None else None
        joined.setdefault(key, []).append(found)
    return [_joined(parts) for parts in joined.values()]


def _joined(parts: Sequence[_Images]) -> _Images:
    """Returns the images of all parts, or the first part without images, which `_refusal` names."""
    for part in parts:
        if not part.names:
            return part
    names = [name for part in parts for name in part.names]
    return _Images(parts[0].run, names, np.concatenate([part.counts for part in parts]))


def _compare(ours: dict[Key, _Images], theirs: dict[Key, _Images]) -> ImageTest:
    both = [key for key in ours if key in theirs]
    if not both:
        return ImageTest(refusal="no seed is also one of the baseline")
    sides = [_join_folds({key: side[key] for key in both}) for side in (ours, theirs)]
    if refusal := _refusal([*sides[1], *sides[0]]):
        return ImageTest(refusal=refusal)
    counts, others = (np.stack([images.counts for images in side], axis=2) for side in sides)
    difference = float(mean_iou(counts.sum(axis=0)) - mean_iou(others.sum(axis=0)))
    interval, p_value = difference_interval(counts, others), swap_p_value(counts, others)
    return ImageTest(difference, *interval, p_value, len(counts), len(sides[0]))


def _refusal(evaluated: Sequence[_Images]) -> str:
    """Says why the evaluations cannot be compared image by image, or returns ""."""
    first = evaluated[0]
    for run, names, counts in evaluated:
        if not names:
            file = f"evaluation_{run.evaluation['split']}"
            return f"{file}.npz of {run.name} is missing or does not match {file}.json"
        if names != first.names:
            return f"{run.name} was evaluated on images of other names than {first.run.name}"
        if not np.array_equal(counts[:, 2], first.counts[:, 2]):
            return f"{run.name} was evaluated with other labels than {first.run.name}"
    if len(first.names) < 2:
        return "a single image cannot be tested"
    return "" if first.counts.any() else "no image has a valid pixel"


def mean_iou(sums: Float64[np.ndarray, "*k 3 s c"]) -> Float64[np.ndarray, "*k"]:
    """Returns the mean IoU, averaged over the seeds, of the counts' sums over images [..., 3, s, c].

    A class with neither true nor predicted pixels is excluded. Without any pixels, returns NaN.
    """
    hit, predicted, true = np.moveaxis(sums, -3, 0)
    union = predicted + true - hit
    iou = np.divide(hit, union, where=union > 0, out=np.zeros_like(union))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.mean(iou.sum(axis=-1) / np.sum(union > 0, axis=-1), axis=-1))


def swap_p_value(counts: Counts, others: Counts) -> float:
    """Returns the two-sided p-value of a permutation test over images.

    The test swaps the counts of some images between the two rows, all seeds together. If the rows
    predict equally well, every such swap is as likely as the observed counts. The p-value is the
    share of swaps after which the mean IoUs differ at least as much as observed. If n images have
    at most NUM_DRAWS swaps, 2^n, all are counted. Otherwise, NUM_DRAWS random swaps and the observed
    counts are counted, so that p is at least 1 / (NUM_DRAWS + 1) (Phipson and Smyth 2010,
    "Permutation p-values should never be zero").
    """
    n = len(counts)
    if 2**n <= NUM_DRAWS:
        swaps = np.arange(2**n)[:, None] >> np.arange(n) & 1
    else:
        swaps = np.random.default_rng(0).integers(0, 2, (NUM_DRAWS + 1, n), np.int8)
        swaps[0] = 0
    # NumPy uses BLAS for float64, in which sums of counts are exact up to 2^53.
    moved = np.tensordot(swaps.astype(np.float64), others - counts, axes=1)
    sums, total = counts.sum(axis=0) + moved, (counts + others).sum(axis=0)
    sizes = np.abs(mean_iou(sums) - mean_iou(total - sums))  # the first is the observed one
    return float(np.mean(sizes >= sizes[0] - 1e-12))  # equal differences may be rounded differently


def difference_interval(counts: Counts, others: Counts) -> tuple[float, float]:
    """Returns the ends of the 95% interval of mean_iou(counts) - mean_iou(others).

    The images are resampled NUM_DRAWS times, the same images for both rows; see
    `aggregation.bootstrap`. Resamples without a valid pixel do not count.
    """
    sums = (aggregation.resampled_sums(side, NUM_DRAWS) for side in (counts, others))
    low, high = aggregation.interval(np.subtract(*map(mean_iou, sums))).tolist()
    return low, high
