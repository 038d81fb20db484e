"""Tests Rand and information scores against counts of pixel pairs, and their properties."""

import itertools
import math

import numpy as np
import pytest

from dense_jax.metrics import instances


def by_hand(prediction, label):
    """Both scores from the definitions; a pixel of no predicted object is alone."""
    pixels = [
        (p if p else f"alone {k}", t)
        for k, (p, t) in enumerate(zip(prediction.flat, label.flat, strict=True))
        if t
    ]
    pairs = list(itertools.product(pixels, repeat=2))
    together = [sum(a[side] == b[side] for a, b in pairs) for side in (0, 1)]
    rand = sum(a == b for a, b in pairs) / np.mean(together)

    def entropy(items):
        fractions = [items.count(item) / len(items) for item in set(items)]
        return -sum(f * math.log(f) for f in fractions)

    guess, truth = ([pixel[side] for pixel in pixels] for side in (0, 1))
    mutual = entropy(guess) + entropy(truth) - entropy(pixels)
    return rand, mutual / ((entropy(guess) + entropy(truth)) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_counting_pairs(seed):
    rng = np.random.default_rng(seed)
    prediction, label = rng.integers(0, 3, (2, 5, 6))
    rand, information = by_hand(prediction, label)
    assert instances.rand_score(prediction, label) == pytest.approx(rand)
    assert instances.information_score(prediction, label) == pytest.approx(information)


def test_numbers_of_objects_do_not_matter_and_background_of_the_label_does_not_count():
    label = np.array([[1, 1, 0, 2, 2]])
    for prediction in ([[7, 7, 7, 3, 3]], [[1, 1, 0, 2, 2]]):
        for score in (instances.rand_score, instances.information_score):
            assert score(np.array(prediction), label) == pytest.approx(1)


def test_a_merger_a_split_and_a_missing_object_cost():
    label = np.array([[1] * 8 + [0] * 2 + [2] * 8])
    merged, split = np.ones_like(label), np.where(np.arange(18) < 4, 3, label)
    for score in (instances.rand_score, instances.information_score):
        for prediction in (merged, split, np.zeros_like(label)):
            assert score(prediction, label) < 0.9
    # Half of the pairs that the prediction puts together belong together.
    assert instances.rand_score(merged, label) == pytest.approx(2 * 0.5 / 1.5)


def test_one_object_and_none():
    one, none = np.ones((2, 2), int), np.zeros((2, 2), int)
    for score in (instances.rand_score, instances.information_score):
        assert score(one, one) == 1.0
        assert math.isnan(score(one, none))
