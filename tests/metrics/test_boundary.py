"""Tests boundary metrics against slow reference implementations, and their properties."""

import math

import numpy as np
import pytest

from dense_jax import metrics
from dense_jax.labels import IGNORE_LABEL
from dense_jax.metrics import boundary, of_kind
from dense_jax.metrics.boundary import MapPair

METRICS = of_kind("boundary")


def score_of(metric, maps, **options):
    """The metric of a single image."""
    value = metric.function(maps, **options)
    if not metric.pooled:
        return value
    top, bottom = value.T
    return np.divide(top, bottom, out=np.full(len(top), math.nan), where=bottom > 0)


def best_and_worst(metric, diagonal):
    """The scores of a perfect and of a missed object."""
    return (1, 0) if metric.higher_is_better else (0, diagonal)


def boundaries_by_hand(prediction, label, c, reach, chessboard):
    """Per side, class c within `reach` of a valid pixel outside it or of the image's end."""
    h, w = label.shape
    valid = {(i, j) for i in range(h) for j in range(w) if 0 <= label[i, j] < 3}
    frame = {(i, j) for i in range(-1, h + 1) for j in range(-1, w + 1)} - set(np.ndindex(h, w))
    sides = []
    for classes in (prediction, label):
        mask = {pixel for pixel in valid if classes[pixel] == c}
        outside = (valid - mask) | frame
        sides.append(
            {
                (i, j)
                for i, j in mask
                for a, b in outside
                if (max if chessboard else sum)((abs(i - a), abs(j - b))) <= reach
            }
        )
    return sides


def boundary_scores_by_hand(prediction, label, c, tolerance):
    guess, truth = boundaries_by_hand(prediction, label, c, 1, chessboard=False)
    diagonal = math.hypot(*label.shape)
    near = boundaries_by_hand(prediction, label, c, max(1, round(0.2 * diagonal)), chessboard=True)
    iou = len(near[0] & near[1]) / len(near[0] | near[1]) if near[0] | near[1] else math.nan
    if not guess and not truth:
        return [math.nan, iou, math.nan, math.nan]
    if not guess or not truth:
        return [0, iou, diagonal, diagonal]
    forth, back = (
        [min(math.dist(p, q) for q in goal) for p in start]
        for start, goal in ((guess, truth), (truth, guess))
    )
    precision, recall = (np.mean(np.array(d) <= tolerance * diagonal) for d in (forth, back))
    return [
        2 * precision * recall / (precision + recall) if precision + recall else 0,
        iou,
        max(np.percentile(forth, 95), np.percentile(back, 95)),
        (sum(forth) + sum(back)) / (len(forth) + len(back)),
    ]


@pytest.mark.parametrize("seed", range(8))
def test_boundary_metrics_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 12, 2))
    prediction = rng.choice(4, shape, p=[0.6, 0.2, 0.1, 0.1])
    label = np.where(rng.random(shape) < 0.7, prediction, rng.choice([0, 1, 3, 255], shape))
    maps = MapPair(prediction, label, 3)
    scores = [
        boundary.boundary_f1(maps, tolerance=0.1),
        score_of(metrics.METRICS["boundary_iou"], maps, width=0.2),
        boundary.hausdorff95(maps),
        boundary.average_surface_distance(maps),
    ]
    expected = [boundary_scores_by_hand(prediction, label, c, 0.1) for c in range(3)]
    np.testing.assert_allclose(np.stack(scores, axis=1), expected)


# 22. MONAI#9095, nnU-Net#380: a missed object has no distance, so that finding less is better
def test_boundary_metrics_of_perfect_missed_and_absent_classes():
    """A missed object costs the whole diagonal: leaving it out would reward finding less."""
    label = np.zeros((30, 40), np.uint8)
    label[10:20, 10:20] = 1
    for metric in METRICS:
        best, worst = best_and_worst(metric, 50)
        perfect = score_of(metric, MapPair(label, label, 3))
        assert perfect.dtype == np.float64
        np.testing.assert_array_equal(perfect, [best, best, np.nan])
        np.testing.assert_array_equal(score_of(metric, MapPair(label, label)), [best, best])
        missed = score_of(metric, MapPair(np.zeros_like(label), label, 3))
        assert missed[1] == worst and np.isnan(missed[2])
        invented = score_of(metric, MapPair(label, np.zeros_like(label), 3))
        assert invented[1] == worst


def test_boundary_metrics_of_a_shifted_square():
    label, prediction = np.zeros((2, 100, 100), np.int32)
    label[20:40, 20:40] = prediction[20:40, 23:43] = 1  # 3 pixels to the right
    assert boundary.hausdorff95(MapPair(prediction, label))[1] == 3
    for tolerance, everything in [(0.0075, False), (0.03, True)]:  # 1.06 and 4.2 pixels
        score = boundary.boundary_f1(MapPair(prediction, label), tolerance=tolerance)[1]
        assert (score == 1) == everything


@pytest.mark.parametrize(("shift", "within"), [(3, True), (4, False)])
def test_the_tolerance_is_three_quarters_of_a_percent_of_the_diagonal(shift, within):
    label, prediction = np.zeros((2, 240, 320), np.uint8)  # a diagonal of 400 pixels
    label[100:150, 100:150] = prediction[100:150, 100 + shift : 150 + shift] = 1
    assert (boundary.boundary_f1(MapPair(prediction, label))[1] == 1) == within


def test_the_rim_is_two_percent_of_the_diagonal():
    label = np.zeros((240, 320), np.uint8)
    label[100:150, 100:150] = 1
    rim = 50**2 - 34**2  # 8 pixels wide
    np.testing.assert_array_equal(boundary.boundary_iou(MapPair(label, label, 2))[1], rim)


def test_ignored_pixels_have_no_boundary_and_make_none():
    label = np.full((9, 9), IGNORE_LABEL)
    label[3:6, 3:6] = 1  # nothing valid next to it
    for metric in METRICS:
        for prediction in (np.ones_like(label), np.where(label == 1, 1, 0)):
            assert np.all(np.isnan(score_of(metric, MapPair(prediction, label, 2))))
        nothing = MapPair(label, np.full_like(label, IGNORE_LABEL), 2)
        assert np.all(np.isnan(score_of(metric, nothing)))


def test_boundary_metrics_of_one_pixel():
    one, zero = np.ones((1, 1), int), np.zeros((1, 1), int)
    for metric in METRICS:
        best, worst = best_and_worst(metric, 2**0.5)
        np.testing.assert_allclose(score_of(metric, MapPair(one, one)), [np.nan, best])
        np.testing.assert_allclose(score_of(metric, MapPair(one, zero)), [worst, worst])


def test_maps_of_two_sizes_and_too_many_classes_are_refused():
    with pytest.raises(ValueError, match="at most 255, not 70001"):
        MapPair(np.zeros((2, 2), int), np.full((2, 2), 70000))
    with pytest.raises(ValueError, match=r"\[h, w\], not \(3, 3\) and \(3, 2\)"):
        MapPair(np.zeros((3, 3), int), np.zeros((3, 2), int))


def random_maps(seed):
    """Large blobs with noise, some prediction outside of the classes, some label ignored."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(20, 40, 2))
    y, x = np.indices(shape)
    label = (np.sin(x / 5 + seed) + np.cos(y / 7) > 0) + (x > 20).astype(int)
    prediction = np.where(rng.random(shape) < 0.9, label, rng.integers(0, 5, shape))
    label[rng.random(shape) < 0.1] = IGNORE_LABEL
    return prediction, label


def test_maps_of_one_byte():
    prediction, label = random_maps(0)
    wide, narrow = (
        MapPair(prediction.astype(dtype), label.astype(dtype), 3) for dtype in (int, np.uint8)
    )
    for function in (*(metric.function for metric in METRICS), boundary.trimap_iou):
        np.testing.assert_array_equal(function(narrow), function(wide))


@pytest.mark.parametrize("seed", range(4))
def test_trimap_iou_counts_the_pixels_near_the_labels_boundaries(seed):
    prediction, label = (x[:14, :17] for x in random_maps(seed))
    h, w = label.shape
    on_boundary = [
        (i, j)
        for i, j in np.ndindex(h, w)
        for a, b in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))
        if 0 <= a < h and 0 <= b < w and label[i, j] != label[a, b]
    ]
    bands = boundary.trimap_iou(MapPair(prediction, label, 3))
    for width, band in zip(boundary.BAND_WIDTHS, bands, strict=True):
        near = np.array(
            [
                [min(max(abs(i - a), abs(j - b)) for a, b in on_boundary) < width for j in range(w)]
                for i in range(h)
            ]
        )
        near &= label != IGNORE_LABEL
        for c in range(3):
            guess, truth = (prediction == c) & near, (label == c) & near
            assert tuple(band[c]) == (np.sum(guess & truth), np.sum(guess | truth))


def test_a_wide_band_holds_the_whole_image_and_an_image_of_one_class_has_no_band():
    label = np.zeros((8, 8), int)
    label[:, 4:] = 1
    prediction = np.roll(label, 1, axis=1)
    widest = boundary.trimap_iou(MapPair(prediction, label, 2))[-1]
    np.testing.assert_array_equal(widest, [[24, 40], [24, 40]])
    assert not boundary.trimap_iou(MapPair(prediction, np.zeros_like(label), 2)).any()


def test_errors_at_the_boundary_cost_more_the_narrower_the_band():
    label = np.zeros((60, 60), int)
    label[20:40, 20:40] = 1
    prediction = np.zeros_like(label)
    prediction[20:40, 22:42] = 1
    both, either = boundary.trimap_iou(MapPair(prediction, label, 2)).sum(axis=1).T
    assert np.all(np.diff(both / either) > 0)
