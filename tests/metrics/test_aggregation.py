"""Tests scores of a split, which are aggregated from measurements of each image."""

import functools
import math

import numpy as np
import pytest

from dense_jax import metrics
from dense_jax.evaluation import per_image
from dense_jax.metrics import aggregation, boundary

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, (6, 9, 11))
LABELS[:2][LABELS[:2] == 2] = 0  # images without class 2
PREDICTIONS = np.where(RNG.random(LABELS.shape) < 0.8, LABELS, RNG.integers(0, 3, LABELS.shape))
PREDICTIONS[:1][PREDICTIONS[:1] == 2] = 0  # which the first does not predict either


@functools.cache
def measured(foreground=()):
    """The measurements of all images, stacked."""
    images = [measure(*maps, foreground) for maps in zip(PREDICTIONS, LABELS, strict=True)]
    return {name: np.stack([image[name] for image in images]) for name in images[0]}


def measure(guess, truth, foreground):
    counts = np.asarray(metrics.confusion_matrix(guess, truth, 3))
    return {"confusion_matrices": counts, **per_image.measure(guess, truth, 3, foreground)}


def score(measurements, foreground=()):
    statistics = aggregation.image_statistics(measurements, foreground)
    return aggregation.score(aggregation.add_up(statistics))


@functools.cache
def scores(foreground=()):
    return score(measured(foreground), foreground)


def test_means_over_images_leave_out_images_without_the_score():
    f1 = measured()["boundary_f1"]
    assert math.isnan(f1[0, 2]) and not np.any(np.isnan(f1[1:]))
    for name in ("boundary_f1", "hausdorff95", "average_surface_distance"):
        expected = np.nanmean(measured()[name], axis=0)
        np.testing.assert_allclose(scores()[name], expected)
        assert scores()[f"mean_{name}"] == pytest.approx(expected.mean())


def test_a_missed_class_lowers_the_score_of_the_split():
    """If the image were left out instead, the mean would rise as a model finds less."""
    last = PREDICTIONS[5].copy()
    last[last == 2] = 0
    fewer = {name: values.copy() for name, values in measured().items()}
    for name, value in measure(last, LABELS[5], ()).items():
        fewer[name][5] = value
    before, after = scores(), score(fewer)
    assert after["boundary_f1"][2] < before["boundary_f1"][2]
    assert after["hausdorff95"][2] > before["hausdorff95"][2]
    assert after["average_surface_distance"][2] > before["average_surface_distance"][2]


def test_boundary_iou_is_of_the_split_not_a_mean_of_images():
    both, either = measured()["boundary_iou"].sum(axis=0).T
    np.testing.assert_allclose(scores()["boundary_iou"], both / either)


def test_segnets_boundary_f1_is_a_mean_over_images_of_the_labels_classes():
    """An invented class, here 2 in image 1, is not among them."""
    f1 = measured()["boundary_f1"]
    assert f1[1, 2] == 0
    of_images = [f1[0, :2].mean(), f1[1, :2].mean(), *f1[2:].mean(axis=1)]
    assert scores()["mean_over_images/mean_boundary_f1"] == pytest.approx(np.mean(of_images))


def test_iou_near_boundaries_is_of_the_split_not_a_mean_of_images():
    both, either = np.moveaxis(measured()["trimap_iou"].sum(axis=0), -1, 0)
    for width, iou in zip(boundary.BAND_WIDTHS, np.mean(both / either, axis=1), strict=True):
        assert scores()[f"trimap_mean_iou/{width}"] == pytest.approx(iou)


def test_objects_are_not_connected_through_ignored_pixels():
    label = np.array([[1, 1, 255, 1, 1]])
    measured = per_image.measure(np.ones_like(label), label, 2, [1])
    assert measured["rand_score"] == measured["information_score"] == 1


def test_foreground_is_one_class_of_several():
    of_split = scores((1, 2))
    guess, truth = PREDICTIONS > 0, LABELS > 0
    both, either = (guess & truth).sum((1, 2)), (guess | truth).sum((1, 2))
    assert of_split["foreground_iou"] == both.sum() / either.sum()
    assert of_split["mean_over_images/foreground_iou"] == pytest.approx(np.mean(both / either))
    assert of_split["foreground_accuracy"] == both.sum() / truth.sum()
    assert of_split["foreground_precision"] == both.sum() / guess.sum()
    assert of_split["foreground_dice"] == 2 * both.sum() / (guess.sum() + truth.sum())
    rand = measured((1, 2))["rand_score"]
    assert of_split["rand_score"] == pytest.approx(rand.mean())


def test_everything_has_an_interval_around_it():
    statistics = aggregation.image_statistics(measured((1, 2)), (1, 2))
    low, high = aggregation.bootstrap(statistics, num_resamples=200)
    point = scores((1, 2))
    assert low.keys() == high.keys() == point.keys()
    for name, value in point.items():
        assert np.all(np.asarray(low[name]) <= value) and np.all(value <= np.asarray(high[name]))


def test_three_billion_pixels():
    matrices = np.full((3, 2, 2), 2**31 - 1, np.int32)
    statistics = aggregation.image_statistics({"confusion_matrices": matrices}, [1])
    sums = aggregation.add_up(statistics)
    assert sums["confusion_matrices"].dtype == np.int64
    assert sums["confusion_matrices"].sum() == 12 * (2**31 - 1)
    split = aggregation.score(sums)
    assert split["mean_iou"] == split["foreground_iou"] == pytest.approx(1 / 3)


class TestBootstrap:
    MATRICES = np.random.default_rng(0).integers(0, 50, (12, 3, 3))

    @staticmethod
    def bootstrap(matrices, **options):
        return aggregation.bootstrap({"confusion_matrices": matrices}, **options)

    def test_intervals_are_percentiles_over_resampled_images(self):
        low, high = self.bootstrap(self.MATRICES, num_resamples=200, seed=3)
        draws = np.random.default_rng(3).multinomial(12, [1 / 12] * 12, size=200)
        summaries = []
        for draw in draws:
            images = [m for m, times in zip(self.MATRICES, draw, strict=True) for _ in range(times)]
            summaries.append(metrics.summarize(np.sum(images, axis=0)))
        assert low.keys() == high.keys() == summaries[0].keys()
        for name in low:
            expected = np.percentile([s[name] for s in summaries], (2.5, 97.5), axis=0)
            np.testing.assert_allclose([low[name], high[name]], expected)

    def test_the_same_seed_gives_the_same_interval_and_another_one_another(self):
        one, same, other = (self.bootstrap(self.MATRICES, seed=s)[0]["iou"] for s in (0, 0, 1))
        np.testing.assert_array_equal(one, same)
        assert np.any(one != other)

    def test_equal_images_leave_no_doubt_and_more_images_less(self):
        equal = np.repeat(self.MATRICES[:1], 5, axis=0)
        width = lambda matrices: np.ptp([end["mean_iou"] for end in self.bootstrap(matrices)])
        np.testing.assert_allclose(width(equal), 0, atol=1e-12)
        assert width(np.repeat(self.MATRICES, 16, axis=0)) < 0.5 * width(self.MATRICES)

    def test_a_class_that_is_nowhere_has_no_interval_and_one_that_is_rare_has(self):
        matrices = np.zeros((6, 3, 3), int)
        matrices[:, 0, 0] = 5
        matrices[0, 1, 1] = 2  # in one image: many resamples are without it
        low, high = (end["iou"] for end in self.bootstrap(matrices))
        np.testing.assert_array_equal(low, [1, 1, np.nan])
        np.testing.assert_array_equal(high, [1, 1, np.nan])

    def test_one_image_has_no_interval(self):
        for end in self.bootstrap(self.MATRICES[:1]):
            assert all(np.all(np.isnan(value)) for value in end.values())

    def test_counts_near_the_limit_of_int32_do_not_overflow(self):
        matrices = np.full((3, 2, 2), 2**31 - 1, np.int32)
        np.testing.assert_allclose(self.bootstrap(matrices)[1]["mean_iou"], 1 / 3)
