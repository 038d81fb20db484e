"""Files written by rows are what other programs read, and appear whole or not at all."""

import gc

import numpy as np
import pytest
import tifffile
from PIL import Image

from dense_jax.inference import writers as results

RNG = np.random.default_rng(0)
PALETTE = RNG.integers(0, 256, (7, 3)).astype(np.uint8)


def write(file, array, height):
    file.start()
    for y in range(0, len(array), height):
        file.write(array[y : y + height])
    file.finish()


def written(file, array, height):
    write(file, array, height)
    file.publish()


@pytest.mark.parametrize("height", [1, 3, 100])
@pytest.mark.parametrize("size", [(1, 1), (10, 1), (7, 13)], ids=str)
@pytest.mark.parametrize("kind", ["palette", "gray", "rgb"])
def test_pictures(tmp_path, kind, size, height):
    path = tmp_path / "a.png"
    shape = (*size, 3) if kind == "rgb" else size
    pixels = RNG.integers(0, 7 if kind == "palette" else 256, shape).astype(np.uint8)
    options = {"rgb": kind == "rgb", "palette": PALETTE if kind == "palette" else None}
    written(results.Png(path, size, **options), pixels, height)
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        assert image.mode == {"palette": "P", "gray": "L", "rgb": "RGB"}[kind]
        np.testing.assert_array_equal(np.asarray(image), pixels)
        if kind == "palette":
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), PALETTE[pixels])


@pytest.mark.parametrize("shape", [(7, 13, 2), (1, 1, 11), (40, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", [results.Npz, results.Tiff])
def test_probabilities(tmp_path, kind, shape):
    path = tmp_path / "a"
    array = RNG.random(shape).astype(np.float16)
    written(kind(path, shape), array, 3)
    if kind is results.Npz:
        with np.load(path) as file:
            found = file["probabilities"]
    else:
        found = tifffile.imread(path).reshape(shape)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, array)
    first = path.read_bytes()
    written(kind(path, shape), array, 3)
    assert path.read_bytes() == first  # no date, and nothing random


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("before")
    file = results.Png(path, (1, 2))
    file.start()
    file.write(np.zeros((1, 2), np.uint8))
    file.finish()
    assert path.read_text() == "before"
    file.publish()
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]
    with Image.open(path) as image:
        assert image.size == (2, 1)


@pytest.mark.parametrize("kind", [results.Png, results.Npz, results.Tiff])
def test_what_is_removed_is_gone_without_a_word(tmp_path, kind):
    picture = kind is results.Png
    file = kind(tmp_path / "a", (4, 5) if picture else (4, 5, 2))
    file.start()
    file.write(np.zeros((2, 5), np.uint8) if picture else np.zeros((2, 5, 2), np.float16))
    file.remove()
    del file
    gc.collect()  # no file that was still open says so now
    assert not list(tmp_path.iterdir())


def made(path, size=(4, 5)):
    """Files at these paths, with what belongs into them."""
    files = [results.Png(path, size), results.Npz(path.with_suffix(".npz"), (*size, 2))]
    arrays = [np.zeros(size, np.uint8), np.zeros((*size, 2), np.float16)]
    return results.Together(files), list(zip(files, arrays, strict=True))


@pytest.mark.parametrize("name", ["a" * 251, "folder"])
def test_files_appear_together_or_not_at_all(tmp_path, name):
    (tmp_path / "folder.npz").mkdir()  # found only when the first one has got its name
    for stem in (name, "b"):
        together, parts = made(tmp_path / f"{stem}.png")
        for file, array in parts:
            together.attempt(file, write, file, array, 3)
        together.end()
        if stem == name:
            assert together.problem and stem in together.problem
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.npz", "b.png", "folder.npz"]
