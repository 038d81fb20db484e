"""Tests that pictures use the palette and mark ignored pixels."""

import numpy as np
import pytest

from dense_jax import class_colors, drawing
from dense_jax.labels import IGNORE_LABEL

PALETTE = np.array([[0, 0, 0], [200, 100, 50]], np.uint8)


def test_colorize_looks_up_the_palette_and_whitens_ignored_pixels():
    labels = np.array([[0, 1, IGNORE_LABEL]], np.int32)
    expected = [[[0, 0, 0], [200, 100, 50], list(class_colors.IGNORED_COLOR)]]
    np.testing.assert_array_equal(class_colors.colorize(labels, PALETTE), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_overlay_mixes_by_opacity_and_leaves_class_0_clear(channels):
    image = np.full((1, 3, channels), 100, np.uint8)
    labels = np.array([[0, 1, IGNORE_LABEL]], np.uint8)
    for opacity, color, ignored in (
        (0.0, [100, 100, 100], [100, 100, 100]),
        (0.5, [150, 100, 75], [178, 178, 178]),
        (1.0, PALETTE[1], class_colors.IGNORED_COLOR),
    ):
        expected = [[[100, 100, 100], color, ignored]]
        np.testing.assert_array_equal(drawing.overlay(image, labels, PALETTE, opacity), expected)


def test_outlines_are_the_pixels_beside_another_class():
    labels = np.random.default_rng(0).integers(0, 3, (3, 4)).repeat(4, 0).repeat(5, 1)
    labels = labels.astype(np.uint8)
    expected = np.zeros_like(labels)
    for y, x in np.ndindex(labels.shape):
        around = labels[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        if len(set(around.flat)) > 1:
            expected[y, x] = labels[y, x] or around.max()
    np.testing.assert_array_equal(drawing.outlines(labels), expected)
    assert set(expected.flat) == {0, 1, 2}


@pytest.mark.parametrize("channels, shown", [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_the_first_channels_stand_for_the_image(channels, shown):
    image = np.tile(np.arange(channels, dtype=np.uint8), (2, 3, 1))
    np.testing.assert_array_equal(drawing.to_rgb(image), np.tile(shown, (2, 3, 1)))


def test_errors_are_marked_and_ignored_pixels_told_apart():
    truth = np.array([[0, 1, 1, IGNORE_LABEL]], np.int32)
    prediction = np.array([[0, 1, 0, 1]], np.uint8)
    np.testing.assert_array_equal(drawing.mistakes(truth, prediction), [[0, 0, 1, 2]])
    image = np.full((1, 4, 1), 200, np.uint8)
    shown = [[100] * 3, [100] * 3, class_colors.WRONG_COLOR, class_colors.IGNORED_COLOR]
    np.testing.assert_array_equal(drawing.errors(image, truth, prediction), [shown])


def test_comparison_hides_predictions_where_the_truth_is_ignored():
    image = np.zeros((2, 3, 1), np.uint8)
    truth = np.full((2, 3), IGNORE_LABEL, np.int32)
    pictures = drawing.comparison(image, truth, np.ones((2, 3), np.uint8), PALETTE)
    assert list(pictures) == ["input", "truth", "prediction", "errors"]
    np.testing.assert_array_equal(pictures["input"], 0)
    np.testing.assert_array_equal([*pictures.values()][1:], 255)


def test_pictures_shrink_to_the_same_size_and_classes_stay_classes():
    image, labels = np.zeros((30, 2000, 3), np.uint8), np.zeros((30, 2000), np.uint8)
    labels[10:, 1000:] = 7
    assert drawing.shrink(image).shape[:2] == drawing.shrink(labels).shape == (7, drawing.LONGEST)
    assert set(drawing.shrink(labels).flat) == {0, 7}
    np.testing.assert_array_equal(drawing.shrink(labels[:, :100]), labels[:, :100])


@pytest.mark.parametrize("axis", [0, 1])
def test_stack_holds_every_picture_whole(axis):
    pictures = [np.full((2, 3, 3), 10, np.uint8), np.full((4, 5, 3), 20, np.uint8)]
    picture = drawing.stack(pictures, axis)
    assert (picture == 10).all(axis=-1).sum() == 6
    assert (picture == 20).all(axis=-1).sum() == 20


def cielab(colors, matrix=((1, 0, 0), (0, 1, 0), (0, 0, 1))):
    """CIELAB coordinates of RGB colors whose linear values go through a matrix first."""
    value = np.array(colors) / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    linear = np.clip(linear @ np.transpose(matrix), 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.transpose(to_xyz) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * 841 / 108 + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def distances(colors, others, *matrix):
    return np.linalg.norm(cielab(colors, *matrix)[:, None] - cielab(others, *matrix), axis=-1)


# Vienot, Brettel and Mollon 1999: those without the pigment for red, or for green.
PROTANOPIA = [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]
DEUTERANOPIA = [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]


@pytest.mark.parametrize(
    "num_classes, apart, apart_blind_to_green",
    [(2, 80, 80), (8, 25, 17), (21, 23, 17), (40, 16, 15), (255, 5, 2)],
)
def test_default_colors_are_apart_from_each_other_and_from_ignored_pixels(
    num_classes, apart, apart_blind_to_green
):
    palette = class_colors.default_palette(num_classes)
    assert palette.shape == (num_classes, 3)
    colors = [*palette.tolist(), class_colors.IGNORED_COLOR]
    pairs = np.triu_indices(len(colors), 1)
    assert distances(colors, colors)[pairs].min() > apart
    assert distances(colors, colors, DEUTERANOPIA)[pairs].min() > apart_blind_to_green


def test_more_classes_leave_the_first_colors_as_they_are():
    longest = class_colors.default_palette(30)
    for num_classes in range(1, 30, 4):
        np.testing.assert_array_equal(
            class_colors.default_palette(num_classes), longest[:num_classes]
        )


@pytest.mark.parametrize("matrix", [(), (PROTANOPIA,), (DEUTERANOPIA,)], ids=len)
def test_errors_stand_out_from_the_image_and_from_ignored_pixels(matrix):
    others = [[gray] * 3 for gray in range(129)] + [class_colors.IGNORED_COLOR]
    assert distances([class_colors.WRONG_COLOR], others, *matrix).min() > 45


def count(picture, color):
    return int((picture == color).all(axis=-1).sum())


@pytest.mark.parametrize("num_classes", [1, 7, 255])
@pytest.mark.parametrize("width", [1, 480, 2000])
def test_a_legend_has_a_square_of_each_color_and_keeps_to_the_width(num_classes, width):
    legend = drawing.legend({f"class {i}": [9, i, 99] for i in range(num_classes)}, width)
    squares = legend[(legend[..., 0] == 9) & (legend[..., 2] == 99)]
    counts = np.bincount(squares[:, 1], minlength=num_classes)
    assert len(counts) == num_classes and len(set(counts)) == 1 and counts[0] > 99
    assert legend.shape[1] <= max(width, 120)  # the width that a single column needs


def test_every_name_in_a_legend_is_drawn_and_long_ones_are_cut():
    def legend(name):
        return drawing.legend({name: [0, 0, 0], "b": [1, 1, 1]}, 1)

    drawn = [legend(name).tobytes() for name in ("", "a", "Straße", "небо", "a b", "x" * 60)]
    assert len(set(drawn)) == len(drawn)
    assert legend("a\n b").tobytes() == legend("a b").tobytes()
    assert legend("x" * 10_000).shape[1] < 900


def test_a_contact_sheet_has_every_picture_title_and_class():
    red, green = (np.full((4, 6, 3), c, np.uint8) for c in ([200, 0, 0], [0, 200, 0]))

    def sheet(row="a", title="b", name="sky"):
        rows = [(row, {title: red, "c": green}), (row, {"c": green}), ("empty", {})]
        return drawing.contact_sheet(rows, {name: [1, 2, 3], "(ignored)": [255, 255, 255]})

    zoom = drawing.LONGEST // 2 // 6
    assert count(sheet(), red[0, 0]) == 4 * 6 * zoom**2
    assert count(sheet(), green[0, 0]) == 2 * 4 * 6 * zoom**2
    assert count(sheet(), [1, 2, 3]) > 99
    drawn = [sheet(), sheet(row="A"), sheet(title="B"), sheet(name="Sky")]
    assert len({each.tobytes() for each in drawn}) == 4
    without_legend = drawing.contact_sheet([("a", {"b": red, "c": green})], {})
    assert np.array_equal(without_legend, sheet()[: len(without_legend), : without_legend.shape[1]])
