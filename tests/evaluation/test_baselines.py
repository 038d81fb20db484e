"""Tests the scores without a network against counts over all pixels."""

import numpy as np
import pytest

from dense_jax import data
from dense_jax.evaluation import baselines

RNG = np.random.default_rng(0)


class Images(data.Source):
    """Images of two classes, of which the first is brighter, and ignored pixels."""

    class_names = ("cell", "ground")
    num_channels = 3
    names = ("0", "1", "2", "3")

    def __init__(self):
        self.examples = []
        for i in range(4):
            label = RNG.integers(0, 2, (9, 7 + i))
            image = RNG.normal(140 - 40 * label, 30).clip(0, 250)[..., None] + [0, 1, 5]
            label[:2] = 255
            self.examples.append({"image": image.astype(np.uint8), "label": label})

    @property
    def sizes(self):
        return np.array([example["label"].shape for example in self.examples])

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]


def iou(prediction, label, k):
    valid = label != 255
    hit = np.sum((prediction == k) & (label == k))
    return hit / np.sum(((prediction == k) | (label == k)) & valid)


def joined(source):
    labels = np.concatenate([example["label"].ravel() for example in source.examples])
    sums = [example["image"].astype(int).sum(axis=-1).ravel() for example in source.examples]
    return labels, np.concatenate(sums) // 3


def test_the_threshold_is_the_best_of_all_levels_and_both_directions():
    source = Images()
    labels, gray = joined(source)
    histogram = baselines.gray_histogram(source)
    assert histogram.sum() == np.sum(labels != 255)
    level, above, matrix = baselines.best_threshold(histogram)
    scores = {
        (t, k): np.mean([iou(np.where(gray >= t, k, 1 - k), labels, c) for c in (0, 1)])
        for t in range(256)
        for k in (0, 1)
    }
    assert above == 0
    best = np.where(gray >= level, 0, 1)
    assert scores[level, 0] == max(scores.values())
    expected = [[np.sum((labels == i) & (best == j)) for j in (0, 1)] for i in (0, 1)]
    np.testing.assert_array_equal(matrix, expected)


def test_baselines_are_those_of_predictions_without_a_network():
    labels = RNG.choice(4, p=[0.5, 0.3, 0.2, 0], size=200_000)
    counts = np.diag(np.bincount(labels, minlength=4))
    found = baselines.compare(counts, ["a", "b", "c", "absent"])
    assert found["below_baseline"] == {}
    assert list(found["baselines"]) == ["commonest_class", "class_prior"]
    always, prior = found["baselines"].values()
    assert always["iou"]["a"] == pytest.approx(0.5, abs=0.01)
    assert always["iou"]["b"] == always["iou"]["c"] == 0
    assert always["mean_iou"] == pytest.approx(always["iou"]["a"] / 3)
    drawn = RNG.permutation(labels)
    for k, name in enumerate("abc"):
        p = np.mean(labels == k)
        assert prior["iou"][name] == pytest.approx(p / (2 - p))
        assert prior["iou"][name] == pytest.approx(iou(drawn, labels, k), abs=0.01)
    assert np.isnan(always["iou"]["absent"]) and np.isnan(prior["iou"]["absent"])


def test_a_class_below_its_best_baseline_is_named():
    counts = np.array([[80, 0, 0], [15, 0, 0], [1, 0, 4]])
    found = baselines.compare(counts, ["road", "car", "sign"])
    assert found["below_baseline"] == {"car": {"iou": 0.0, "baseline": "class_prior"}}
    first, second = baselines.sentences(found)
    prior = (0.8 / 1.2 + 0.15 / 1.85 + 0.05 / 1.95) / 3
    assert first == (
        "Mean IoU without a network: 0.267 (always road), "
        f"{prior:.3f} (a random guess by the classes' shares)."
    )
    assert second == (
        "Classes whose IoU is lower than without a network: car (0.000, but 0.081 with a random "
        "guess by the classes' shares)."
    )


def test_without_valid_pixels_there_is_nothing_to_compare():
    found = baselines.compare(np.zeros((2, 2), np.int64), ["a", "b"], np.zeros((2, 256), np.int64))
    assert found == {"baselines": {}, "below_baseline": {}} and baselines.sentences(found) == []


def test_images_are_only_read_for_two_classes():
    source = Images()
    source.class_names, source.examples = ("a", "b", "c"), None
    assert baselines.gray_histogram(source) is None


@pytest.mark.parametrize(("dtype", "low", "high"), [("uint16", 100, 5000), ("float32", -1.5, 0.25)])
def test_gray_levels_span_the_declared_range(dtype, low, high):
    channels = np.linspace(low, high, 2048).reshape(64, 16, 2).astype(dtype)
    for top in (high, 2 * high - low, (low + high) / 2):
        found = baselines.gray_levels(channels, (low, top))
        share = (channels.mean(axis=-1, dtype=float) - low) / (top - low)
        np.testing.assert_allclose(found, np.clip(255 * share, 0, 255), atol=1.5)
