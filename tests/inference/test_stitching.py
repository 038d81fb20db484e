"""Tiles cut from strips, and put together: each pixel once, or blended by weights that add up to 1."""

import numpy as np
import pytest

from dense_jax.data.tiles import Tiles
from dense_jax.inference import stitching as mosaic
from dense_jax.inference.stitching import Failure, Mosaic, Piece, cut

CUTS = [((8, 8), 0), ((8, 9), 2), ((16, 10), 3), ((64, 301), 16), ((300, 7), 3)]


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
def test_every_pixel_of_every_size_is_written_once_and_in_order(tile_size, margin, blend):
    sizes = [(n, 3) for n in range(1, 301)] + [(3, n) for n in range(1, 301)]
    tiles = Tiles(Images(sizes), tile_size, margin)
    blocks = Mosaic(tiles, tiles.margin if blend else (0, 0))
    counts = [np.zeros(size, int) for size in sizes]
    ends = np.zeros(len(sizes), int)
    for number in range(len(tiles)):
        i, rows, columns = blocks.block(number)
        counts[i][rows, columns] += 1
        assert rows.start <= ends[i] <= rows.stop
        if columns.stop == sizes[i][1]:
            ends[i] = rows.stop
    for count in counts:
        np.testing.assert_array_equal(count, 1)


def put_together(tiles, blocks, map_of):
    """The maps of all images, from those of the tiles."""
    maps = [np.full(size, np.nan, np.float32) for size in tiles.source.sizes]
    for number in range(len(tiles)):
        i, rows, columns = blocks.block(number)
        maps[i][rows, columns] = blocks.add(number, map_of(number)[..., None])[..., 0]
    return maps


BLENDED = [((16, 12), 3), ((12, 40), 5), ((16, 16), 6)]  # of the last, three tiles meet on an axis


@pytest.mark.parametrize(("tile_size", "margin"), [*CUTS, *BLENDED], ids=str)
def test_where_tiles_agree_blending_changes_nothing(tile_size, margin):
    tiles = Tiles(Images([(70, 51), (9, 80), (1, 1)]), tile_size, margin)
    blocks = Mosaic(tiles, tiles.margin)
    constant = np.full(tiles.tile_size, 0.1, np.float32)
    for each in put_together(tiles, blocks, lambda _: constant):
        np.testing.assert_array_equal(each, np.float32(0.1))


@pytest.mark.parametrize(("tile_size", "margin"), BLENDED, ids=str)
def test_the_weights_of_tiles_are_a_symmetric_gaussian_over_the_sum_of_all(tile_size, margin):
    """From the definition, in two dimensions and with a division."""
    size = (70, 121)
    tiles = Tiles(Images([size]), tile_size, margin)
    gaussians = np.zeros((len(tiles), *size))
    for number in range(len(tiles)):
        _, place, _ = tiles.place(number)
        factors = []
        for s, core, n in zip(place, tiles.core, size, strict=True):
            length = core + 2 * margin
            x = np.arange(n) - (s.start - margin)
            inside = (x >= 0) & (x < length)
            factors.append(inside * np.exp(-(((x - (length - 1) / 2) / (length / 8)) ** 2) / 2))
        gaussians[number] = np.outer(*factors)
    expected = gaussians / gaussians.sum(axis=0)
    rows, columns = map(int, tiles.num_tiles[0])
    middle = rows // 2 * columns + columns // 2
    for number in (0, columns - 1, middle, len(tiles) - 1):
        (found,) = put_together(
            tiles,
            Mosaic(tiles, tiles.margin),
            lambda k, number=number: np.full(tiles.tile_size, k == number, np.float32),
        )
        np.testing.assert_allclose(found, expected[number], atol=1e-6)
    # In the midst of others, a tile weighs the same from both ends.
    place = tuple(slice(s.start - margin, s.stop + margin) for s in tiles.place(middle)[1])
    assert all(0 <= s.start and s.stop <= n for s, n in zip(place, size, strict=True))
    window = expected[middle][place]
    np.testing.assert_allclose(window, window[::-1], atol=1e-12)
    np.testing.assert_allclose(window, window[:, ::-1], atol=1e-12)


@pytest.mark.parametrize("strip", [1, 3, 1000])
@pytest.mark.parametrize(("tile_size", "margin"), CUTS, ids=str)
def test_tiles_cut_from_strips_are_those_cut_from_whole_images(tile_size, margin, strip):
    images = Images([(7, 13), (40, 9), (1, 1), (17, 310), (305, 4)], strip)
    tiles = Tiles(images, tile_size, margin)
    blocks = Mosaic(tiles, tiles.margin // 2)
    rows = [[] for _ in images.sizes]
    number = -1
    for number, piece in enumerate(cut(images, tiles, blocks)):
        assert isinstance(piece, Piece) and piece.number == number
        np.testing.assert_array_equal(piece.image, tiles[number]["image"])
        if piece.rows is not None:
            rows[blocks.block(number)[0]].append(piece.rows)
    assert number == len(tiles) - 1
    for i, parts in enumerate(rows):
        np.testing.assert_array_equal(np.concatenate(parts), images.whole(i))


def test_no_more_rows_are_held_than_a_row_of_tiles_shows(monkeypatch):
    most, reader = 0, mosaic._reader

    def recording(*arguments):
        read = reader(*arguments)

        def recorded(start, stop):
            nonlocal most
            first, held = read(start, stop)
            most = max(most, len(held))
            return first, held

        return recorded

    monkeypatch.setattr(mosaic, "_reader", recording)
    images = Images([(1000, 5)])
    tiles = Tiles(images, (16, 16), 3)
    assert len(list(cut(images, tiles, Mosaic(tiles, (0, 0))))) == len(tiles)
    assert 16 <= most < 16 + images.strip


def test_an_image_that_breaks_off_ends_with_what_is_wrong_and_the_next_goes_on():
    class Broken(Images):
        def strips(self, i):
            for number, strip in enumerate(super().strips(i)):
                if i == 1 and number == 7:
                    raise ValueError("broken off")
                yield strip

    images = Broken([(40, 9), (40, 9), (40, 9)])
    tiles = Tiles(images, (8, 16), 0)
    pieces = list(cut(images, tiles, Mosaic(tiles, (0, 0))))
    assert [piece.index for piece in pieces if isinstance(piece, Failure)] == [1]
    numbers = [piece.number for piece in pieces if isinstance(piece, Piece)]
    assert numbers == [0, 1, 2, 3, 4, 5, 6, *range(10, 15)]


def test_an_image_with_fewer_rows_than_expected_fails():
    class Short(Images):
        def strips(self, i):
            return iter(list(super().strips(i))[:-1])

    images = Short([(40, 9)])
    tiles = Tiles(images, (8, 16), 0)
    *_, last = cut(images, tiles, Mosaic(tiles, (0, 0)))
    assert isinstance(last, Failure) and "39 rows" in str(last.problem)
