"""Tests the formulas for class weights, and that training labels are counted only once."""

import numpy as np
import pytest

from dense_jax.data import balance, open_dataset, verify

COUNTS = np.array([[30, 10, 0, 0], [50, 0, 10, 0], [20, 20, 0, 0]])  # pixels [image, class]


def test_median_frequency_counts_a_class_only_where_it_is_seen():
    frequency = [100 / 140, 30 / 80, 10 / 60]  # of the images that show the class
    median = sorted(frequency)[1]
    expected = [*(median / f for f in frequency), 0]
    np.testing.assert_allclose(balance.median_frequency(COUNTS), expected)


def test_inverse_frequency_gives_every_class_the_same_total_weight():
    weights = balance.inverse_frequency(COUNTS)
    np.testing.assert_allclose(weights * COUNTS.sum(axis=0), [140 / 3] * 3 + [0])
    assert weights[3] == 0


@pytest.mark.parametrize("method", balance.METHODS)
def test_equal_classes_weigh_1(method):
    np.testing.assert_allclose(balance.METHODS[method](np.full((3, 4), 7)), 1)


def test_images_of_rare_classes_are_repeated():
    """Class 0 is in all images, class 1 in 2 of 3, class 2 in 1 of 3, class 3 in none."""
    for threshold, expected in ((0.3, [1, 1, 1]), (0.5, [1, 1.5, 1]), (1.0, [1.5, 3.0, 1.5])):
        np.testing.assert_allclose(balance.repeat_factors(COUNTS, threshold) ** 2, expected)


def test_an_image_without_labels_is_repeated_like_common_ones():
    counts = np.vstack([COUNTS, np.zeros((1, 4), int)])
    assert balance.repeat_factors(counts, 1.0)[3] == 1


def test_counts_are_those_of_the_valid_pixels_and_are_kept(tiny_folder, monkeypatch):
    source = open_dataset("folder", str(tiny_folder), "train")
    expected = [[np.sum(source[i]["label"] == c) for c in range(2)] for i in range(len(source))]
    np.testing.assert_array_equal(balance.class_counts(source), expected)
    monkeypatch.setattr(verify, "scan", None)  # not called again
    np.testing.assert_array_equal(balance.class_counts(source), expected)


def test_data_that_is_made_in_memory_is_counted_each_time():
    source = open_dataset("synthetic", "", "val")
    weights = balance.class_weights("inverse_frequency", source)
    assert len(weights) == source.num_classes and min(weights) > 0


@pytest.mark.parametrize("method", balance.METHODS)
def test_weights_of_labels_that_are_all_ignored_are_refused(method):
    with pytest.raises(ValueError, match="no pixel of the split has any"):
        balance.METHODS[method](np.zeros((3, 2), np.int64))


def test_published_weights_are_for_their_dataset_alone(tiny_folder):
    source = open_dataset("folder", str(tiny_folder), "train")
    with pytest.raises(ValueError, match=r"'segnet_camvid' are 11 weights, but .* 2 classes: dark"):
        balance.class_weights("segnet_camvid", source)


def test_camvids_weights_are_the_published_ones_but_for_sign_symbols(real_data):
    """They come from all 367 labels; SegNet's list does not fit the labels as released."""
    source = open_dataset("folder", str(real_data / "camvid"), "train")
    counts = np.array([np.bincount(source[i]["label"].ravel(), minlength=256) for i in range(4)])
    assert balance.class_counts(source).shape == (367, 11)
    np.testing.assert_array_equal(balance.class_counts(source)[:4], counts[:, :11])
    expected = [0.2794, 0.2018, 4.7889, 0.1491, 1.0, 0.4235, 3.8464, 1.9798, 0.7890, 6.3847, 8.8193]
    weights = np.array(balance.class_weights("median_frequency", source))
    np.testing.assert_allclose(weights, expected, atol=5e-5)
    published = np.array(balance.PUBLISHED["segnet_camvid"])
    assert published[6] / weights[6] > 2.5
