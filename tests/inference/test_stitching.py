"""Tests that stitched tiles cover each pixel once, or are blended by weights that sum to 1."""

import numpy as np
import pytest

from dense_jax.data.tiles import Tiles
from dense_jax.inference import stitching
from dense_jax.inference.stitching import Failure, Stitcher, Tile, cut

CUTS = [((8, 8), 0), ((8, 9), 2), ((16, 10), 3), ((24, 81), 6), ((80, 7), 3)]
SIZES = [(7, 13), (40, 9), (1, 1), (17, 90), (85, 4)]


class Images:
    """Images whose pixels hold their own place, as strips of a few rows."""

    def __init__(self, sizes, strip=3):
        self.sizes = np.array(sizes, np.int32)
        self.strip = strip

    def whole(self, i):
        h, w = self.sizes[i]
        pixels = np.stack(np.broadcast_arrays(np.arange(h)[:, None], np.arange(w), i), axis=-1)
        return (pixels % 251).astype(np.uint8)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        return {"image": self.whole(i), "label": np.zeros(self.sizes[i], np.uint8)}

    def strips(self, i):
        image = self.whole(i)
        return (image[y : y + self.strip] for y in range(0, len(image), self.strip))


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize(("tile_size", "margin"), CUTS, ids=str)
def test_every_pixel_of_every_size_is_in_one_block_and_rows_are_in_order(tile_size, margin, blend):
    sizes = [(n, 3) for n in range(1, 82)] + [(3, n) for n in range(1, 82)]
    tiles = Tiles(Images(sizes), tile_size, margin)
    stitcher = Stitcher(tiles, tiles.margin if blend else (0, 0))
    counts = [np.zeros(size, int) for size in sizes]
    ends = np.zeros(len(sizes), int)
    for number in range(len(tiles)):
        i, (rows, columns), _ = stitcher.block(number)
        counts[i][rows, columns] += 1
        assert rows.start <= ends[i] <= rows.stop
        if columns.stop == sizes[i][1]:
            ends[i] = rows.stop
    for count in counts:
        np.testing.assert_array_equal(count, 1)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("tile_size", "margin"), CUTS, ids=str)
def test_strips_are_the_rows_of_images_from_the_top_down(tile_size, margin, overlap):
    images = Images(SIZES)
    tiles = Tiles(images, tile_size, margin)
    stitcher = Stitcher(tiles, tiles.margin if overlap else (0, 0))
    rows = [[] for _ in SIZES]
    for number in range(len(tiles)):
        image = stitcher.crop(number, tiles[number]["image"])
        if strip := stitcher.add(number, {"image": image, "gray": image[..., 0]}):
            assert strip.start == sum(map(len, rows[strip.index])) < strip.stop
            np.testing.assert_array_equal(strip.maps["image"][..., 0], strip.maps["gray"])
            rows[strip.index].append(strip.maps["image"])
    for i, parts in enumerate(rows):
        np.testing.assert_array_equal(np.concatenate(parts), images.whole(i))


@pytest.mark.parametrize("whole", [False, True])
def test_without_an_overlap_tiles_may_come_in_any_order(whole):
    images = Images(SIZES)
    tiles = Tiles(images, (8, 9), 2)
    stitcher = Stitcher(tiles, whole=whole)
    maps = [np.zeros((*size, 3), np.uint8) for size in SIZES]
    for number in np.random.default_rng(0).permutation(len(tiles)).tolist():
        block = stitcher.crop(number, tiles[number]["image"])
        if strip := stitcher.add(number, {"image": block}):
            assert not whole or (strip.start, strip.stop) == (0, SIZES[strip.index][0])
            maps[strip.index][strip.start : strip.stop] = strip.maps["image"]
    for i, stitched in enumerate(maps):
        np.testing.assert_array_equal(stitched, images.whole(i))


def blended(tiles, map_of):
    """The maps of all images, blended from the maps of tiles: map_of(number) is float [th, tw]."""
    stitcher = Stitcher(tiles, tiles.margin)
    rows = [[] for _ in tiles.source.sizes]
    for number in range(len(tiles)):
        block = stitcher.blend(number, map_of(number)[..., None])
        if strip := stitcher.add(number, {"map": block[..., 0]}):
            rows[strip.index].append(strip.maps["map"])
    return [np.concatenate(parts) for parts in rows]


BLENDED = [((16, 12), 3), ((12, 40), 5), ((16, 16), 6)]  # in the last, three tiles meet on an axis


@pytest.mark.parametrize(("tile_size", "margin"), [*CUTS, *BLENDED], ids=str)
def test_where_tiles_agree_blending_changes_nothing(tile_size, margin):
    tiles = Tiles(Images([(70, 51), (9, 80), (1, 1)]), tile_size, margin)
    constant = np.full(tiles.tile_size, 0.1, np.float32)
    for values in blended(tiles, lambda _: constant):
        np.testing.assert_array_equal(values, np.float32(0.1))


@pytest.mark.parametrize(("tile_size", "margin"), BLENDED, ids=str)
def test_the_weights_of_tiles_are_a_symmetric_gaussian_over_the_sum_of_all(tile_size, margin):
    """From the definition, in two dimensions and with a division."""
    size = (50, 101)
    tiles = Tiles(Images([size]), tile_size, margin)
    gaussians = np.zeros((len(tiles), *size))
    for number in range(len(tiles)):
        factors = []
        for s, core, n in zip(tiles.place(number).in_image, tiles.core, size, strict=True):
            length = core + 2 * margin
            x = np.arange(n) - (s.start - margin)
            inside = (x >= 0) & (x < length)
            factors.append(inside * np.exp(-(((x - (length - 1) / 2) / (length / 8)) ** 2) / 2))
        gaussians[number] = np.outer(*factors)
    expected = gaussians / gaussians.sum(axis=0)
    rows, columns = map(int, tiles.num_tiles[0])
    middle = rows // 2 * columns + columns // 2
    for number in (0, columns - 1, middle, len(tiles) - 1):
        (weights,) = blended(
            tiles, lambda k, number=number: np.full(tiles.tile_size, k == number, np.float32)
        )
        np.testing.assert_allclose(weights, expected[number], atol=1e-6)
    # A tile among others has the same weights from both ends.
    in_image = tiles.place(middle).in_image
    window = tuple(slice(s.start - margin, s.stop + margin) for s in in_image)
    assert all(0 <= s.start and s.stop <= n for s, n in zip(window, size, strict=True))
    weights = expected[middle][window]
    np.testing.assert_allclose(weights, weights[::-1], atol=1e-12)
    np.testing.assert_allclose(weights, weights[:, ::-1], atol=1e-12)


@pytest.mark.parametrize("strip", [1, 3, 1000])
@pytest.mark.parametrize(("tile_size", "margin"), CUTS, ids=str)
def test_tiles_cut_from_strips_are_those_cut_from_whole_images(tile_size, margin, strip):
    images = Images(SIZES, strip)
    tiles = Tiles(images, tile_size, margin)
    number = -1
    for number, tile in enumerate(cut(images, tiles)):
        assert isinstance(tile, Tile) and tile.number == number
        np.testing.assert_array_equal(tile.image, tiles[number]["image"])
    assert number == len(tiles) - 1


def test_no_more_rows_are_kept_than_a_row_of_tiles_shows(monkeypatch):
    most = 0

    class Recorder(stitching._Reader):
        def read(self, start, stop):
            nonlocal most
            first, rows = super().read(start, stop)
            most = max(most, len(rows))
            return first, rows

    monkeypatch.setattr(stitching, "_Reader", Recorder)
    images = Images([(1000, 5)])
    tiles = Tiles(images, (16, 16), 3)
    assert len(list(cut(images, tiles))) == len(tiles)
    assert 16 <= most < 16 + images.strip


def test_an_image_that_breaks_off_ends_with_a_failure_and_the_next_goes_on():
    class Broken(Images):
        def strips(self, i):
            for number, strip in enumerate(super().strips(i)):
                if i == 1 and number == 7:
                    raise ValueError("broken off")
                yield strip

    images = Broken([(40, 9), (40, 9), (40, 9)])
    tiles = list(cut(images, Tiles(images, (8, 16), 0)))
    assert [tile.index for tile in tiles if isinstance(tile, Failure)] == [1]
    numbers = [tile.number for tile in tiles if isinstance(tile, Tile)]
    assert numbers == [0, 1, 2, 3, 4, 5, 6, *range(10, 15)]


def test_a_forgotten_image_leaves_nothing_behind():
    images = Images([(8, 20), (8, 20)])
    tiles = Tiles(images, (8, 10), 0)
    stitcher = Stitcher(tiles)
    blocks = [{"image": stitcher.crop(k, tiles[k]["image"])} for k in range(len(tiles))]
    assert stitcher.add(0, blocks[0]) is None
    stitcher.forget(0)
    assert stitcher.add(2, blocks[2]) is None
    assert stitcher.add(1, blocks[1]) is None  # alone: the other tile was forgotten
    strip = stitcher.add(3, blocks[3])
    np.testing.assert_array_equal(strip.maps["image"], images.whole(1))


def test_an_image_with_fewer_rows_than_expected_fails():
    class Short(Images):
        def strips(self, i):
            return iter(list(super().strips(i))[:-1])

    images = Short([(40, 9)])
    *_, last = cut(images, Tiles(images, (8, 16), 0))
    assert isinstance(last, Failure) and "39 rows" in str(last.problem)
