"""Tests metrics against slow reference implementations, and their properties.

test_conformance.py compares metrics with other libraries, and test_sharding.py across devices.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.conformance import golden_input
from dense_jax import metrics
from dense_jax.labels import IGNORE_LABEL
from dense_jax.metrics import confusion

MEANS = ("pixel_accuracy", "mean_accuracy", "mean_iou", "frequency_weighted_iou", "mean_dice")
confusion_matrix = jax.jit(metrics.confusion_matrix, static_argnums=2)


def golden_maps() -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels of three classes, some pixels ignored."""
    logits, labels = golden_input("ign")
    return np.argmax(logits, axis=-1), labels


def random_maps(shape: tuple[int, ...], num_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Class maps with values outside of the classes on both sides, and ignored labels."""
    rng = np.random.default_rng(0)
    predictions = rng.integers(-1, num_classes + 1, shape)
    labels = rng.choice([*range(-1, num_classes + 1), IGNORE_LABEL], shape)
    return predictions, labels


def by_hand(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    counts = np.zeros((num_classes, num_classes), np.int64)
    for guess, truth in zip(predictions.flat, labels.flat, strict=True):
        if 0 <= guess < num_classes and 0 <= truth < num_classes:
            counts[truth, guess] += 1
    return counts


def test_confusion_matrix_equals_a_python_loop():
    for shape in [(2, 4, 5), (3, 7), (1, 1), (11,), (0, 3)]:
        predictions, labels = random_maps(shape)
        counts = metrics.confusion_matrix(predictions, labels, 3)
        assert counts.dtype == jnp.int32
        np.testing.assert_array_equal(counts, by_hand(predictions, labels, 3))


def test_the_ways_to_count_of_all_devices_agree():
    """One kind of device uses only one of them."""
    predictions, labels = (x.ravel().astype(np.int32) for x in random_maps((9, 11)))
    for count in (confusion._count_by_adding, confusion._count_by_product):
        counts = count(jnp.asarray(labels), jnp.asarray(predictions), 3)
        assert counts.dtype == jnp.int32
        np.testing.assert_array_equal(counts, by_hand(predictions, labels, 3))


def test_labels_of_one_byte():
    maps = golden_maps()
    counts = metrics.confusion_matrix(*(x.astype(np.uint8) for x in maps), 3)
    np.testing.assert_array_equal(counts, by_hand(*maps, 3))


# 28. scenic: label num_classes is counted as the last class, label 255 silently dropped
def test_label_equal_to_num_classes_is_not_the_last_class():
    assert not metrics.confusion_matrix(np.array([2, 2]), np.array([3, 255]), 3).any()


# 23. torchmetrics#312, #2747, pytorch-lightning#2736: ignoring drops a class, not its pixels
# 25. segmentation_models.pytorch#546: an ignored class counts as 0 in the mean
def test_what_is_predicted_on_ignored_pixels_changes_nothing():
    """The example of torchmetrics#312, its class 0 ignored."""
    labels = np.array([2, 1, 1, IGNORE_LABEL])
    for predictions in ([1, 2, 1, 1], [1, 2, 1, 0]):
        counts = metrics.confusion_matrix(np.array(predictions), labels, 3)
        assert metrics.summarize(counts)["mean_iou"] == pytest.approx(1 / 6)


# 26. segmentation_models.pytorch#659: weights divide by the number of classes twice
def test_equally_frequent_classes_weigh_as_in_the_mean():
    scores = metrics.summarize(np.array([[3, 2, 1], [0, 6, 0], [1, 4, 1]]))
    assert scores["frequency_weighted_iou"] == pytest.approx(scores["mean_iou"])


# 24. huggingface/evaluate#421: ignore_index=0 turns IoU into recall
def test_predicting_a_class_on_a_valid_pixel_is_never_excused():
    """Ignoring drops pixels by label, not a class: false negatives of the others still count."""
    counts = metrics.confusion_matrix(np.array([0, 0, 1, 1]), np.array([255, 1, 1, 255]), 2)
    np.testing.assert_array_equal(counts, [[0, 0], [1, 1]])
    assert metrics.summarize(counts)["iou"][1] == 0.5


# 17. segmentation_models.pytorch#207, #226, DABNet#8: mean IoU depends on the batch size
def test_batching_padding_and_order_change_nothing():
    predictions, labels = random_maps((6, 4, 5))
    expected = by_hand(predictions, labels, 3)
    for batch in (1, 4, 6):
        counts = np.zeros((3, 3), np.int64)
        order = np.random.default_rng(batch).permutation(6)
        for start in range(0, 6, batch):
            chosen = order[start : start + batch]
            label = np.full((batch, 4, 5), IGNORE_LABEL)
            label[: len(chosen)] = labels[chosen]
            counts += np.asarray(
                confusion_matrix(np.resize(predictions[chosen], label.shape), label, 3)
            )
        np.testing.assert_array_equal(counts, expected)


# 27. segmentation_models.pytorch: `accuracy` is (tp + tn) / all, not pixel accuracy
def test_scores_equal_their_definitions_pixel_by_pixel():
    predictions, labels = golden_maps()
    valid = labels != IGNORE_LABEL
    scores = metrics.summarize(by_hand(predictions, labels, 3))
    for c in range(3):
        p, t = predictions[valid] == c, labels[valid] == c
        assert scores["dice"][c] == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))
        assert scores["accuracy"][c] == pytest.approx((p & t).sum() / t.sum())
        assert scores["precision"][c] == pytest.approx((p & t).sum() / p.sum())
        assert scores["binary_accuracy"][c] == pytest.approx((p == t).mean())
    assert all(type(scores[name]) is float for name in MEANS)


# 19. pytorch-lightning#3097, tensorflow#12294: a class that is nowhere scores 0
# 20. torchmetrics#2846, #2850: generalized Dice 0, or Dice 1, for a class that is nowhere
def test_nan_only_where_nothing_is_divided_by_nothing():
    scores = metrics.summarize(np.array([[4, 1, 0, 0], [0] * 4, [2, 0, 0, 0], [0] * 4]))
    nan = math.nan
    for name, expected in {
        "iou": [4 / 7, 0, 0, nan],
        "dice": [8 / 11, 0, 0, nan],
        "accuracy": [4 / 5, nan, 0, nan],
        "precision": [4 / 6, 0, nan, nan],
        "binary_accuracy": [4 / 7, 6 / 7, 5 / 7, nan],
    }.items():
        assert scores[name] == pytest.approx(expected, nan_ok=True), name
    assert scores["mean_accuracy"] == pytest.approx(0.4)
    assert scores["mean_iou"] == pytest.approx(4 / 21)


def test_nothing_counted_is_nan_without_a_warning():
    for value in metrics.summarize(np.zeros((3, 3), np.int64)).values():
        assert np.all(np.isnan(value))


def test_one_pixel():
    for guess, iou in [(1, 1.0), (0, 0.0)]:
        counts = confusion_matrix(np.array([[guess]]), np.array([[1]]), 2)
        assert metrics.summarize(counts)["mean_iou"] == iou


# 33. jeo: int32 counts overflow where they are added up
def test_more_pixels_than_int32_holds():
    """1500 images of 2048 x 1024: each is counted in int32, their sum is kept in int64."""
    rows = np.zeros((2048, 1024), np.uint8)
    image = np.asarray(confusion_matrix(rows, rows, 2))
    assert image.dtype == np.int32
    total = np.broadcast_to(image, (1500, 2, 2)).sum(axis=0, dtype=np.int64)
    np.testing.assert_array_equal(total, [[3_145_728_000, 0], [0, 0]])
    assert metrics.summarize(total)["pixel_accuracy"] == 1.0
    counts = np.array([[3_000_000_000, 0], [1_000_000_000, 10**18]])
    assert metrics.summarize(counts)["iou"] == pytest.approx([0.75, 1.0])
    assert metrics.summarize(np.diag([10**18] * 10))["pixel_accuracy"] == 1.0
    with pytest.raises(ValueError, match="negative or NaN count -1149239296"):
        metrics.summarize(total.astype(np.int32))


def test_wrong_input_is_an_error_that_says_what_was_found():
    with pytest.raises(ValueError, match=r"square, not \(2, 3\)"):
        metrics.summarize(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"\(2,\) and labels \(3,\) differ"):
        metrics.confusion_matrix(np.zeros(2, int), np.zeros(3, int), 2)
    with pytest.raises(ValueError, match="predictions must be integer class ids, not float32"):
        metrics.confusion_matrix(np.zeros(2, np.float32), np.zeros(2, int), 2)
    with pytest.raises(ValueError, match="1 to 255, not 256"):
        metrics.confusion_matrix(np.zeros(2, int), np.zeros(2, int), 256)
