"""Tests that a fingerprint states the properties of images and labels that were made with them."""

import numpy as np
import pytest

from dense_jax.data import fingerprint
from dense_jax.data.source import Source
from dense_jax.labels import IGNORE_LABEL


class Arrays(Source):
    """A source of arrays in memory."""

    class_names = ("a", "b", "c")

    def __init__(self, images, labels):
        self._images, self._labels = images, labels
        self.num_channels = images[0].shape[-1]

    names = property(lambda self: tuple(map(str, range(len(self)))))
    sizes = property(lambda self: np.array([label.shape for label in self._labels], np.int32))

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, i):
        return {"image": self._images[i], "label": self._labels[i], "name": str(i)}


def made(labels, brightness=None):
    """A source with these labels, and noise of deviation 10 around the brightness of each image."""
    rng = np.random.default_rng(0)
    brightness = brightness or [100] * len(labels)
    images = [
        rng.normal(mean, 10, (*label.shape, 3)).round().clip(0, 255).astype(np.uint8)
        for mean, label in zip(brightness, labels, strict=True)
    ]
    return Arrays(images, labels)


def test_shares_count_valid_pixels():
    label = np.array([[0, 0, 1, IGNORE_LABEL], [2, 1, 1, IGNORE_LABEL]], np.uint8)
    uniform = np.full((3, 2), 2, np.uint8)
    found = fingerprint.measure(made([label, uniform]))
    np.testing.assert_allclose(found.shares, np.array([2, 3, 7]) / 12)


def test_objects_are_the_connected_regions_of_all_classes():
    label = np.zeros((20, 20), np.uint8)
    label[2:6, 2:6] = label[2:6, 10:14] = 1
    label[12:16, 2:6], label[18, 18] = 2, 2  # the last one is too small
    label[12:16, 10:14] = IGNORE_LABEL
    assert fingerprint.measure(made([label] * 3)).num_objects == 3 * 4


def test_upright_is_the_distance_between_upper_and_lower_half():
    above = np.zeros((8, 6), np.uint8)
    assert fingerprint.measure(made([above])).upright == 0
    above[:4] = 1
    assert fingerprint.measure(made([above])).upright == 1
    above[:2] = 0
    assert fingerprint.measure(made([above])).upright == pytest.approx(0.5)
    assert fingerprint.measure(made([above, above[::-1]])).upright == 0


def test_exposure_spread_is_relative_to_the_deviation_within_images():
    labels = [np.zeros((50, 50), np.uint8)] * 2
    assert fingerprint.measure(made(labels, [100, 100])).exposure_spread < 0.1
    found = fingerprint.measure(made(labels, [80, 120]))
    assert found.exposure_spread == pytest.approx(20 / 10, rel=0.1)


def test_coarse_structures_survive_a_low_resolution_and_fine_ones_do_not():
    y, x = np.mgrid[:64, :64]
    coarse, fine = ((y // n + x // n) % 2 for n in (16, 1))
    for label, survives in ((coarse, True), (fine, False)):
        found = fingerprint.measure(made([label.astype(np.uint8)]))
        at = dict(zip(fingerprint.RESOLUTIONS, found.confusions, strict=True))
        np.testing.assert_array_equal(at[1.0], np.diag(np.diag(at[1.0])))
        assert (np.trace(at[0.25]) > 0.95 * label.size) == survives


def test_reduced_agrees_with_a_mean_over_blocks():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 3, (6, 5)).astype(np.uint8)
    label = blocks.repeat(4, 0).repeat(4, 1)
    reduced = fingerprint.reduced(label, 0.25)
    # A pixel beside the center of its block is nearer to it than to any other block.
    np.testing.assert_array_equal(reduced[1::4, 1::4], blocks)
    np.testing.assert_array_equal(fingerprint.reduced(label, 1.0), label)


def test_only_some_images_of_many_are_read(monkeypatch):
    monkeypatch.setattr(fingerprint, "NUM_READ", 3)
    labels = [np.full((2, 2), i % 3, np.uint8) for i in range(9)]
    found = fingerprint.measure(made(labels))
    assert len(found.sizes) == 9
    np.testing.assert_allclose(found.shares, [1 / 3, 1 / 3, 1 / 3])  # images 0, 4 and 8


def test_nothing_labeled_is_refused():
    label = np.full((2, 2), IGNORE_LABEL, np.uint8)
    with pytest.raises(ValueError, match="every pixel of the 1 labels"):
        fingerprint.measure(made([label]))
