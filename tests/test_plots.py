"""Colours are those of the palette; ignored pixels are told apart."""

import numpy as np
import pytest

from dense_jax import plots
from dense_jax.labels import IGNORE_LABEL

PALETTE = np.array([[0, 0, 0], [200, 100, 50]], np.uint8)


def test_colourise_looks_up_the_palette_and_whitens_ignored_pixels():
    labels = np.array([[0, 1, IGNORE_LABEL]], np.int32)
    expected = [[[0, 0, 0], [200, 100, 50], list(plots.IGNORED_COLOUR)]]
    np.testing.assert_array_equal(plots.colourise(labels, PALETTE), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_overlay_mixes_by_opacity(channels):
    image = np.full((1, 2, channels), 100, np.uint8)
    labels = np.array([[0, 1]], np.uint8)
    grey = np.broadcast_to(image, (1, 2, 3))
    np.testing.assert_array_equal(plots.overlay(image, labels, PALETTE, 0.0), grey)
    np.testing.assert_array_equal(
        plots.overlay(image, labels, PALETTE, 1.0), plots.colourise(labels, PALETTE)
    )
    np.testing.assert_array_equal(plots.overlay(image, labels, PALETTE)[0, 1], [150, 100, 75])


@pytest.mark.parametrize("channels, shown", [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_the_first_channels_stand_for_the_image(channels, shown):
    image = np.tile(np.arange(channels, dtype=np.uint8), (2, 3, 1))
    np.testing.assert_array_equal(plots.to_rgb(image), np.tile(shown, (2, 3, 1)))


def test_comparison_hides_predictions_where_the_truth_is_ignored():
    image = np.zeros((2, 3, 1), np.uint8)
    truth = np.full((2, 3), IGNORE_LABEL, np.int32)
    picture = plots.comparison(image, truth, np.ones((2, 3), np.uint8), PALETTE)
    assert picture.shape[0] == 2
    np.testing.assert_array_equal(picture[:, -3:], 255)


def test_stack_holds_every_row_whole():
    rows = [np.full((2, 3, 3), 10, np.uint8), np.full((4, 5, 3), 20, np.uint8)]
    picture = plots.stack(rows)
    assert (picture == 10).all(axis=-1).sum() == 6
    assert (picture == 20).all(axis=-1).sum() == 20


@pytest.mark.parametrize("num_classes", [1, 2, 8, 9, 150, 255])
def test_default_colours_differ(num_classes):
    palette = plots.default_palette(num_classes)
    assert palette.shape == (num_classes, 3)
    assert len(np.unique(palette, axis=0)) > 0.9 * num_classes


def test_a_contact_sheet_has_every_title_and_class():
    picture = np.zeros((4, 6, 3), np.uint8)
    rows = {"train": {"a": picture, "b": picture}, "val": {"c": picture}, "test": {}}
    figure = plots.contact_sheet(rows, {"sky": [0, 0, 0], "road": [200, 100, 50]})
    assert {axis.get_ylabel() for axis in figure.axes} == {"", *rows}
    assert {axis.get_title() for axis in figure.axes} == {"", "a", "b", "c"}
    assert sum(len(axis.images) for axis in figure.axes) == 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["sky", "road", "(ignored)"]
