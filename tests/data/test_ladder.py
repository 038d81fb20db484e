"""Tests the choice of tile sizes for images of several sizes."""

import numpy as np
import pytest

from dense_jax.data import ladder

# The sizes and numbers of images of a public set of nuclei.
NUCLEI = {
    (256, 256): 334,
    (256, 320): 112,
    (520, 696): 96,
    (360, 360): 91,
    (1024, 1024): 16,
    (512, 640): 13,
    (603, 1272): 6,
    (1040, 1388): 1,
}
RNG = np.random.default_rng(0)


def repeat(counts):
    return np.repeat(list(counts), list(counts.values()), axis=0)


def padding(sizes, rungs):
    """Returns the padded pixels per pixel of the images, each in the smallest rung it fits into."""
    areas = [min(h * w for h, w in rungs if h >= height and w >= width) for height, width in sizes]
    return sum(areas) / sum(height * width for height, width in sizes)


@pytest.mark.parametrize("size", [(7, 5), (360, 480)], ids=str)
def test_images_of_one_size_have_one_rung(size):
    assert ladder.choose(np.array([size] * 3, np.int32)) == [list(size)]


@pytest.mark.parametrize(
    "sizes",
    [repeat(NUCLEI), RNG.integers(100, 400, (60, 2)), RNG.geometric(0.004, (80, 2)) + 40],
    ids=["nuclei", "uniform", "skewed"],
)
def test_few_rungs_hold_all_images_with_little_padding(sizes):
    rungs = ladder.choose(sizes)
    assert padding(sizes, rungs) <= ladder.ENOUGH or len(rungs) == ladder.MOST_RUNGS
    assert padding(sizes, rungs) < 0.8 * padding(sizes, [sizes.max(axis=0)])
    # No rung could be left out.
    largest = sizes.max(axis=0).tolist()
    for rung in rungs:
        if rung != largest:
            fewer = [other for other in rungs if other != rung]
            assert padding(sizes, [*fewer, largest]) > ladder.ENOUGH
    taken = ladder.take(sizes, np.array(rungs))
    assert sorted({tuple(rung) for rung in taken.tolist()}) == sorted(map(tuple, rungs))
    assert ladder.choose(sizes[::-1]) == rungs


def test_rungs_are_no_more_than_needed():
    sizes = repeat({(100, 1000): 5, (1000, 100): 5, (950, 100): 5})
    assert ladder.choose(sizes) == [[100, 1000], [1000, 100]]
    assert ladder.choose(repeat({(300, 300): 50, (200, 200): 1})) == [[300, 300]]


def test_tiny_images_share_a_rung():
    assert ladder.choose(repeat({(12, 16): 9, (31, 9): 9})) == [[31, 16]]
    assert ladder.choose(repeat({(8, 8): 500, (64, 64): 1, (8, 40): 9})) == [[64, 64]]


def test_an_image_takes_the_smallest_rung_that_holds_it():
    rungs = RNG.integers(1, 50, (6, 2))
    sizes = RNG.integers(1, 60, (200, 2))
    for size, taken in zip(sizes.tolist(), ladder.take(sizes, rungs).tolist(), strict=True):
        holding = [rung for rung in rungs.tolist() if rung[0] >= size[0] and rung[1] >= size[1]]
        expected = min(holding, key=lambda rung: rung[0] * rung[1], default=None)
        assert taken == (expected or rungs.max(axis=0).tolist())
