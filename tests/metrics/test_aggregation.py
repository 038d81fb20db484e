"""Scores of a split from what was counted of each image."""

import math

import numpy as np
import pytest

from dense_jax import metrics
from dense_jax.evaluation import per_image
from dense_jax.metrics import aggregation as tallies
from dense_jax.metrics import boundary

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, (6, 9, 11))
LABELS[:2][LABELS[:2] == 2] = 0  # images without class 2
PREDICTIONS = np.where(RNG.random(LABELS.shape) < 0.8, LABELS, RNG.integers(0, 3, LABELS.shape))
PREDICTIONS[:1][PREDICTIONS[:1] == 2] = 0  # which the first does not predict either


def counted(foreground=(), predictions=PREDICTIONS):
    of_images = [
        {
            "confusion_matrices": np.asarray(metrics.confusion_matrix(guess, truth, 3)),
            **per_image.measure(guess, truth, 3, foreground),
        }
        for guess, truth in zip(predictions, LABELS, strict=True)
    ]
    return {name: np.stack([image[name] for image in of_images]) for name in of_images[0]}


def scores(foreground=(), predictions=PREDICTIONS):
    of_images = tallies.tally(counted(foreground, predictions), foreground)
    return tallies.score(tallies.total(of_images))


def test_means_over_images_leave_out_images_without_the_score():
    f1 = counted()["boundary_f1"]
    assert math.isnan(f1[0, 2]) and not np.any(np.isnan(f1[1:]))
    for name in ("boundary_f1", "hausdorff95", "average_surface_distance"):
        expected = np.nanmean(counted()[name], axis=0)
        np.testing.assert_allclose(scores()[name], expected)
        assert scores()[f"mean_{name}"] == pytest.approx(expected.mean())


def test_a_missed_class_lowers_the_score_of_the_split():
    """Item by item left out, the mean would rise as a model finds less."""
    fewer = PREDICTIONS.copy()
    fewer[5][fewer[5] == 2] = 0
    before, after = scores(), scores(predictions=fewer)
    assert after["boundary_f1"][2] < before["boundary_f1"][2]
    assert after["hausdorff95"][2] > before["hausdorff95"][2]
    assert after["average_surface_distance"][2] > before["average_surface_distance"][2]


def test_boundary_iou_is_of_the_split_not_a_mean_of_images():
    both, either = counted()["boundary_iou"].sum(axis=0).T
    np.testing.assert_allclose(scores()["boundary_iou"], both / either)


def test_segnets_boundary_f1_is_a_mean_over_images_of_the_labels_classes():
    """An invented class, here 2 in image 1, is not among them."""
    f1 = counted()["boundary_f1"]
    assert f1[1, 2] == 0
    of_images = [f1[0, :2].mean(), f1[1, :2].mean(), *f1[2:].mean(axis=1)]
    assert scores()["mean_over_images/mean_boundary_f1"] == pytest.approx(np.mean(of_images))


def test_iou_near_boundaries_is_of_the_split_not_a_mean_of_images():
    both, either = np.moveaxis(counted()["trimap_iou"].sum(axis=0), -1, 0)
    for width, iou in zip(boundary.BAND_WIDTHS, np.mean(both / either, axis=1), strict=True):
        assert scores()[f"trimap_mean_iou/{width}"] == pytest.approx(iou)


def test_objects_are_not_connected_through_ignored_pixels():
    label = np.array([[1, 1, 255, 1, 1]])
    measured = per_image.measure(np.ones_like(label), label, 2, [1])
    assert measured["rand_score"] == measured["information_score"] == 1


def test_foreground_is_one_class_of_several():
    of_split = scores(foreground=[1, 2])
    guess, truth = PREDICTIONS > 0, LABELS > 0
    both, either = (guess & truth).sum((1, 2)), (guess | truth).sum((1, 2))
    assert of_split["foreground_iou"] == both.sum() / either.sum()
    assert of_split["mean_over_images/foreground_iou"] == pytest.approx(np.mean(both / either))
    assert of_split["foreground_accuracy"] == both.sum() / truth.sum()
    assert of_split["foreground_precision"] == both.sum() / guess.sum()
    assert of_split["foreground_dice"] == 2 * both.sum() / (guess.sum() + truth.sum())
    rand = counted([1, 2])["rand_score"]
    assert of_split["rand_score"] == pytest.approx(rand.mean())


def test_everything_has_an_interval_around_it():
    of_images = tallies.tally(counted([1]), [1])
    point = tallies.score(tallies.total(of_images))
    low, high = metrics.bootstrap(of_images, tallies.score, num_resamples=200)
    assert low.keys() == high.keys() == point.keys()
    for name, value in point.items():
        assert np.all(np.asarray(low[name]) <= value) and np.all(value <= np.asarray(high[name]))


def test_three_billion_pixels():
    matrices = np.full((3, 2, 2), 2**31 - 1, np.int32)
    totals = tallies.total(tallies.tally({"confusion_matrices": matrices}, [1]))
    assert totals["confusion_matrices"].dtype == np.int64
    assert totals["confusion_matrices"].sum() == 12 * (2**31 - 1)
    of_split = tallies.score(totals)
    assert of_split["mean_iou"] == of_split["foreground_iou"] == pytest.approx(1 / 3)
