"""Tests that other programs can read the written files, which appear whole or not at all."""

import gc

import numpy as np
import pytest
import tifffile
from PIL import Image

from dense_jax.inference import writers

RNG = np.random.default_rng(0)
PALETTE = RNG.integers(0, 256, (7, 3)).astype(np.uint8)


def parts(array, height):
    return (array[y : y + height] for y in range(0, len(array), height))


def write(file, array, height):
    for rows in parts(array, height):
        file.write(rows)
    file.publish()


@pytest.mark.parametrize("height", [1, 3, 100])
@pytest.mark.parametrize("size", [(1, 1), (10, 1), (7, 13)], ids=str)
@pytest.mark.parametrize("kind", ["palette", "gray", "rgb"])
def test_pictures(tmp_path, kind, size, height):
    path = tmp_path / "a.png"
    shape = (*size, 3) if kind == "rgb" else size
    pixels = RNG.integers(0, 7 if kind == "palette" else 256, shape).astype(np.uint8)
    options = {"rgb": kind == "rgb", "palette": PALETTE if kind == "palette" else None}
    write(writers.Png(path, size, **options), pixels, height)
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        assert image.mode == {"palette": "P", "gray": "L", "rgb": "RGB"}[kind]
        np.testing.assert_array_equal(np.asarray(image), pixels)
        if kind == "palette":
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), PALETTE[pixels])


@pytest.mark.parametrize("shape", [(7, 13, 2), (1, 1, 11), (40, 3, 4)], ids=str)
@pytest.mark.parametrize("ending", ["npy", "tif"])
def test_arrays(tmp_path, ending, shape):
    path = tmp_path / f"a.{ending}"
    array = RNG.random(shape).astype(np.float16)
    write(writers.Array(path, shape), array, 3)
    written = np.load(path) if ending == "npy" else tifffile.imread(path).reshape(shape)
    assert written.dtype == np.float16
    np.testing.assert_array_equal(written, array)
    first = path.read_bytes()
    write(writers.Array(path, shape), array, 3)
    assert path.read_bytes() == first  # no date, and nothing random


@pytest.mark.parametrize("size", [(1, 1), (256, 256), (257, 255), (700, 600)], ids=str)
@pytest.mark.parametrize("height", [1, 100, 1000])
def test_tiled_class_maps(tmp_path, size, height):
    path = tmp_path / "a.tif"
    classes = RNG.integers(0, 256, size).astype(np.uint8)  # noise, which deflating enlarges
    tags = ((33550, 12, 3, (10.0, 10.0, 0.0), True), (34737, 2, 6, "Zürich|".encode(), True))
    write(writers.GeoTiff(path, size, PALETTE, tags), classes, height)
    np.testing.assert_array_equal(tifffile.imread(path), classes)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages.first.tags[33550].value == (10.0, 10.0, 0.0)
        assert tiff.pages.first.tags[34737].value == "Zürich|"
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), classes)
        assert image.getpalette()[:21] == PALETTE.ravel().tolist()
    first = path.read_bytes()
    write(writers.GeoTiff(path, size, PALETTE, tags), classes, height)
    assert path.read_bytes() == first  # no date, and nothing random


def test_a_class_map_that_may_exceed_4_gib_is_a_big_tiff(tmp_path):
    file = writers.GeoTiff(tmp_path / "a.tif", (2**16, 2**16), PALETTE, ())
    file.write(np.ones((1, 2**16), np.uint8))
    with tifffile.TiffFile(tmp_path / ".a.tif.tmp") as tiff:
        assert tiff.is_bigtiff and tiff.pages.first.shape == (2**16, 2**16)
    file.remove()
    assert not list(tmp_path.iterdir())


def test_an_array_of_more_than_4_gib_is_a_big_tiff(tmp_path):
    file = writers.Array(tmp_path / "a.tif", (2**16, 2**13, 5))  # almost all of it is a hole
    file.write(np.ones((1, 2**13, 5), np.float16))
    with tifffile.TiffFile(tmp_path / ".a.tif.tmp") as tiff:
        assert tiff.is_bigtiff and tiff.pages[0].shape == (2**16, 2**13, 5)
        assert tiff.pages[0].photometric == 1 and tiff.pages[0].planarconfig == 1
    file.remove()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("before")
    file = writers.Png(path, (1, 2))
    file.write(np.zeros((1, 2), np.uint8))
    assert path.read_text() == "before"
    file.publish()
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    with Image.open(path) as image:
        assert image.size == (2, 1)


@pytest.mark.parametrize("name", ["a.png", "a.npy", "a.tif"])
def test_a_file_that_is_removed_leaves_nothing_and_no_warning(tmp_path, name):
    if name == "a.png":
        file, rows = writers.Png(tmp_path / name, (4, 5)), np.zeros((2, 5), np.uint8)
    else:
        file, rows = writers.Array(tmp_path / name, (4, 5, 2)), np.zeros((2, 5, 2), np.float16)
    file.write(rows)
    file.remove()
    del file
    gc.collect()  # a file that is still open would warn now
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a" * 251, "folder"])
def test_files_appear_together_or_not_at_all(tmp_path, name):
    (tmp_path / "folder.npy").mkdir()  # met only after the first file has got its name
    for stem in (name, "b"):
        together = writers.Together(
            {
                "classes": writers.Png(tmp_path / f"{stem}.png", (4, 5)),
                "probabilities": writers.Array(tmp_path / f"{stem}.npy", (4, 5, 2)),
            }
        )
        together.write("classes", parts(np.zeros((4, 5), np.uint8), 3))
        together.write("probabilities", parts(np.zeros((4, 5, 2), np.float16), 3))
        together.end()
        if stem == name:
            assert together.problem and stem in together.problem
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.npy", "b.png", "folder.npy"]
