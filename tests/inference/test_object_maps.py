"""Tests that objects are found, shared out, measured and counted, against SciPy and loops."""

import csv

import numpy as np
import pytest
from scipy import ndimage

from dense_jax.inference import object_maps
from dense_jax.inference.object_maps import Kinds
from dense_jax.inference.stitching import Strip

RNG = np.random.default_rng(0)


def blobs(height, width, num_classes):
    """Smooth random regions of classes."""
    noise = RNG.normal(size=(num_classes, height, width))
    return ndimage.gaussian_filter(noise, (0, 2, 2)).argmax(axis=0).astype(np.uint8)


def same_groups(first, second):
    """Whether two maps group the same pixels, whatever the numbers."""
    pairs = len(np.unique(np.stack([first, second]).reshape(2, -1), axis=1).T)
    return pairs == len(np.unique(first)) == len(np.unique(second))


def test_objects_are_the_components_of_each_class():
    classes = blobs(40, 50, 4)
    objects = object_maps.number(classes, Kinds({1: "b", 3: "d"}, None))
    assert set(np.unique(objects)) == set(range(objects.max() + 1))
    np.testing.assert_array_equal(objects > 0, (classes == 1) | (classes == 3))
    for k in (1, 3):
        components, count = ndimage.label(classes == k)  # 4-connected
        assert count > 1
        assert same_groups(np.where(classes == k, objects, 0), components)


def test_border_pixels_go_to_the_nearest_object_where_they_touch_one():
    classes = np.zeros((30, 41), np.uint8)
    classes[5:15, 4:31] = 2  # a border around two objects, one pixel apart
    classes[7:13, 6:15], classes[7:13, 16:29] = 1, 3
    classes[20:23, 5:9] = 2  # a border of nothing
    objects = object_maps.number(classes, Kinds({1: "b", 3: "d"}, border=2))
    assert set(np.unique(objects)) == {0, 1, 2}
    np.testing.assert_array_equal(objects[classes == 1], 1)
    np.testing.assert_array_equal(objects[classes == 3], 2)
    np.testing.assert_array_equal(objects[classes == 0], 0)
    np.testing.assert_array_equal(objects[20:23, 5:9], 0)
    places = {k: np.argwhere(classes == c) for k, c in ((1, 1), (2, 3))}
    for y, x in np.argwhere(classes[:16] == 2):
        distances = {k: np.hypot(*(place - (y, x)).T).min() for k, place in places.items()}
        assert distances[objects[y, x]] == min(distances.values())


def test_measurements_are_those_of_each_objects_pixels():
    classes = blobs(60, 45, 3)
    confidence = RNG.uniform(0.4, 1, classes.shape).astype(np.float16)
    kinds = Kinds({1: "cell"}, border=2)
    objects = object_maps.number(classes, kinds)
    rows = list(object_maps.measure(objects, classes, confidence, kinds))
    assert len(rows) == objects.max() > 3
    for k, row in enumerate(rows, 1):
        named = dict(zip(object_maps.COLUMNS[1:], row, strict=True))
        inside = objects == k
        y, x = np.nonzero(inside)
        assert (named["object"], named["class"], named["area"]) == (k, "cell", len(y))
        box = [named[side] for side in ("top", "left", "bottom", "right")]
        assert box == [y.min(), x.min(), y.max() + 1, x.max() + 1]
        centroid = float(named["centroid_y"]), float(named["centroid_x"])
        np.testing.assert_allclose(centroid, (y.mean(), x.mean()), atol=0.0051)
        mean = confidence[inside & (classes == 1)].astype(np.float64).mean()
        np.testing.assert_allclose(float(named["mean_probability"]), mean, atol=5.1e-5)


def test_an_image_in_strips_has_the_objects_of_the_whole():
    classes = blobs(50, 30, 2)
    maps = {"classes": classes, "confidence": np.ones(classes.shape, np.float16)}
    kinds = Kinds({1: "b"}, None)
    image = object_maps.ObjectsOfImage(50, kinds)
    parts = []
    for start, stop in ((0, 1), (1, 20), (20, 50)):
        assert not parts and not image.rows
        strip = {name: values[start:stop] for name, values in maps.items()}
        parts += image.add(Strip(0, start, stop, strip))
    np.testing.assert_array_equal(np.concatenate(parts), object_maps.number(classes, kinds))
    assert image.rows == list(object_maps.measure(parts[0], **maps, kinds=kinds))


def test_more_objects_than_a_map_can_number_are_refused():
    classes = (np.indices((400, 400)).sum(axis=0) % 2).astype(np.uint8)
    with pytest.raises(ValueError, match=r"has 80000 objects, .* at most 65535 .*--objects"):
        object_maps.number(classes, Kinds({1: "b"}, None))
    most = np.zeros((2, 2 * 65535), np.uint8)
    most[0, ::2] = 1
    assert object_maps.number(most, Kinds({1: "b"}, None)).max() == 65535


def test_kinds_of_objects_by_name():
    names = ["sky", "cell", "border", "dirt"]
    assert object_maps.kinds(names, [], None) == ({}, None)
    assert object_maps.kinds(names, ["all"], None).classes == {1: "cell", 2: "border", 3: "dirt"}
    assert object_maps.kinds(names, ["all"], "border") == ({1: "cell", 3: "dirt"}, 2)
    assert object_maps.kinds(names, ["sky"], "border") == ({0: "sky"}, 2)
    for wanted, border, why in (
        (["cel"], None, "no class 'cel'; there are: sky, .*did you mean 'cell'"),
        (["all"], "bord", "no class 'bord'"),
        (["border"], "border", "'border' cannot be in both"),
        ([], "border", "pass --objects, too"),
    ):
        with pytest.raises(ValueError, match=why):
            object_maps.kinds(names, wanted, border)


def test_tables_have_every_image_and_a_summary_of_the_counts(tmp_path):
    paths = tmp_path / "objects.csv", tmp_path / "counts.csv"
    rows = [(k, name, *range(8)) for k, name in enumerate(("a", "b, c", "a"), 1)]
    tables = {"first": rows, "none": [], "last": rows[:1]}
    object_maps.write_tables(tables, ["a", "b, c"], *paths)
    objects, counts = (list(csv.reader(path.read_text().splitlines())) for path in paths)
    assert objects[0] == [*object_maps.COLUMNS]
    images = [(line[0], line[1], line[2]) for line in objects[1:]]
    assert images == [
        *(("first", "1", "a"), ("first", "2", "b, c"), ("first", "3", "a"), ("last", "1", "a"))
    ]
    assert counts == [
        ["image", "a", "b, c"],
        ["first", "2", "1"],
        ["none", "0", "0"],
        ["last", "1", "0"],
    ]
    assert object_maps.summarize(paths[1]).splitlines() == [
        "a: 3 objects in 3 images, 0 to 2 each",
        "b, c: 1 objects in 3 images, 0 to 1 each",
    ]
    object_maps.write_tables({}, ["a"], *paths)
    assert object_maps.summarize(paths[1]) == ""
