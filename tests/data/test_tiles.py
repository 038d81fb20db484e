"""Tests that tiles predict every pixel exactly once, with real or mirrored context."""

import numpy as np
import pytest

from dense_jax.data.tiles import Tiles, tilings
from dense_jax.labels import IGNORE_LABEL


class Source:
    """Images whose pixels hold their own position."""

    def __init__(self, *sizes):
        self.sizes = np.array(sizes, np.int32)
        self.reads = 0

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        self.reads += 1
        h, w = self.sizes[i]
        image = np.stack(np.broadcast_arrays(np.arange(h)[:, None], np.arange(w), i), axis=-1)
        return {"image": image.astype(np.uint8), "label": np.zeros((h, w), np.int32), "name": ""}


@pytest.mark.parametrize("tile", [(8, 8), (16, 10), (300, 9), (64, 64)], ids=str)
@pytest.mark.parametrize("margin", [0, 1, 3])
def test_every_pixel_belongs_to_exactly_one_core(tile, margin):
    sizes = [(1, 1), (7, 13), (40, 9), (16, 10), (17, 50)]
    tiles = Tiles(Source(*sizes), tile, margin)
    count = [np.zeros(size, int) for size in sizes]
    for k in range(len(tiles)):
        example = tiles[k]
        assert example["image"].shape == (*tiles.tile_size, 3)
        i, in_image, in_tile = tiles.place(k)
        count[i][in_image] += 1
        core = example["image"][in_tile]
        rows, columns = np.mgrid[in_image]
        np.testing.assert_array_equal(core, np.stack([rows, columns, rows * 0 + i], axis=-1))
        valid = np.zeros(tiles.tile_size, bool)
        valid[in_tile] = True
        np.testing.assert_array_equal(example["label"] == 0, valid)
        np.testing.assert_array_equal(example["label"] == IGNORE_LABEL, ~valid)
        assert example["index"] == k
    for each in count:
        np.testing.assert_array_equal(each, 1)


def test_context_is_real_inside_the_image_and_mirrored_outside():
    source = Source((20, 30))
    tiles = Tiles(source, (12, 12), 3)
    padded = np.pad(source[0]["image"], ((9, 9), (9, 9), (0, 0)), mode="reflect")
    for k in range(len(tiles)):
        _, (rows, columns), _ = tiles.place(k)
        top, left = rows.start + 9 - 3, columns.start + 9 - 3
        expected = padded[top : top + 12, left : left + 12]
        np.testing.assert_array_equal(tiles[k]["image"], expected)


def geometry(*arguments, **options):
    """Returns (height and width, margins, images with tiles) of each tiling."""
    return [
        (
            *map(tuple, (each.tile_size, each.margin)),
            np.unique([each.place(k)[0] for k in range(len(each))]).tolist(),
        )
        for each in tilings(*arguments, **options)
    ]


def test_an_axis_that_fits_is_one_tile_without_margin():
    (tiles,) = tilings(Source((10, 40), (12, 90)), [(14, 90)], (16, 32), 4)
    assert tuple(tiles.tile_size) == (14, 32)
    assert tuple(tiles.margin) == (0, 4)
    assert len(tiles) == 2 + 4  # columns of 24 pixels


def test_an_axis_longer_than_those_of_the_run_is_cut():
    sizes = [(10, 13), (15, 13), (9, 20), (70, 70), (14, 14)]
    found = geometry(Source(*sizes), [(14, 14)], (16, 18), 4)
    assert found == [
        ((14, 14), (0, 0), [0, 4]),
        ((14, 18), (0, 4), [2]),
        ((16, 14), (4, 0), [1]),
        ((16, 18), (4, 4), [3]),
    ]
    # What a run's images need not be cut for, others may be too large for.
    assert geometry(Source((10, 13)), [(14, 14)], (16, 18), 8) == [((14, 14), (0, 0), [0])]
    with pytest.raises(ValueError, match=r"\(16, 14\).*margin of 8"):
        tilings(Source((10, 13), (15, 13)), [(14, 14)], (16, 18), 8)


@pytest.mark.parametrize("ladder", [[(16, 20)], [(8, 14), (16, 8), (30, 9), (16, 20)]], ids=str)
def test_an_image_is_cut_in_the_same_way_whatever_others_there_are(ladder):
    sizes = [(1, 1), (7, 13), (40, 9), (16, 10), (17, 50), (3, 20), (90, 90), (15, 20), (29, 9)]

    def cut(*of_source):
        """Returns the tiles of each image."""
        source = Source(*of_source)
        found = [[] for _ in of_source]
        for tiles in tilings(source, ladder, (24, 18), 3, context=1):
            for k in range(len(tiles)):
                i, *places = tiles.place(k)
                found[i].append((tiles[k]["image"][..., :2], *places))
        return found

    for size, together in zip(sizes, cut(*sizes), strict=True):
        (alone,) = cut(size)
        count = np.zeros(size, int)
        for (image, *places), (expected, *others) in zip(alone, together, strict=True):
            np.testing.assert_array_equal(image, expected)
            assert places == others
            count[places[0]] += 1
        np.testing.assert_array_equal(count, 1)


def test_neighboring_tiles_decode_their_image_once():
    source = Source((64, 64), (64, 64))
    tiles = Tiles(source, (16, 16), 0)
    for k in range(len(tiles)):
        tiles[k]
    assert source.reads == 2


def test_a_margin_that_leaves_no_core_is_an_error():
    with pytest.raises(ValueError, match=r"\(16, 16\).*margin of 8"):
        Tiles(Source((64, 64)), (16, 16), 8)


def test_context_that_a_network_needs_is_on_every_axis():
    source = Source((10, 40), (12, 90))
    (tiles,) = tilings(source, [(12, 90)], (32, 32), 4, context=6)
    assert tuple(tiles.margin) == (6, 6)
    assert tuple(tiles.tile_size) == (12 + 12, 32)  # the first axis fits, with its context
    padded = np.pad(source[1]["image"], ((6, 6), (6, 6), (0, 0)), mode="reflect")
    last = max(k for k in range(len(tiles)) if tiles.place(k)[1][1].start == 20)
    np.testing.assert_array_equal(tiles[last]["image"], padded[:24, 20:52])
    (tiles,) = tilings(source, [(12, 90)], (32, 32), 8, context=6)
    assert tuple(tiles.margin) == (6, 8)
    with pytest.raises(ValueError, match="margin of 16"):
        tilings(source, [(12, 90)], (32, 32), 4, context=16)


def test_an_image_takes_the_smallest_rung_that_holds_it_with_the_context_around():
    sizes = [(10, 10), (7, 12), (8, 8), (3, 14), (12, 3), (12, 14), (13, 3)]
    ladder = [(8, 8), (8, 14), (12, 10)]
    assert geometry(Source(*sizes), ladder, (16, 18), 4, context=2) == [
        ((12, 12), (2, 2), [2]),
        ((12, 18), (2, 2), [1, 3]),
        ((16, 14), (2, 2), [0, 4]),
        ((16, 18), (2, 2), [5]),  # the highest rung's height and the widest rung's width
        ((16, 18), (4, 2), [6]),  # higher than any rung
    ]
    # A rung that is wider than the tiles, with its context, is cut.
    assert geometry(Source(*sizes[:2]), ladder, (16, 16), 5, context=2) == [
        ((12, 16), (2, 5), [1]),
        ((16, 14), (2, 2), [0]),
    ]
