"""Chooses the tile sizes for images of several sizes.

A tile larger than its image costs computation, and every size of tile costs the compilation of one
program. A *ladder* is the compromise: a few sizes, its *rungs*. An image is padded to the smallest
rung that holds it, whatever other images there are; see `tiles.tilings`.
"""

import numpy as np
from jaxtyping import Int

MOST_RUNGS = 8
ENOUGH = 1.2  # the padded pixels per pixel of the images at which no more rungs are added
SMALLEST = 32 * 32  # pixels; padding tiny images costs less than compiling a program
NUM_LENGTHS = 32  # heights and widths to choose from


def choose(sizes: Int[np.ndarray, "n 2"]) -> list[list[int]]:
    """Returns the ladder for images of these heights and widths: [[height, width], ...].

    The first rung is as high as the highest image and as wide as the widest. Then the rung that
    saves the most padding is added, one after another, until the images are padded to at most
    ENOUGH times their pixels, or there are MOST_RUNGS. The candidates combine NUM_LENGTHS quantiles
    of the heights with as many of the widths. At last, every rung shrinks to the images that take
    it, and a rung that no image takes is dropped.
    """
    sizes, counts = np.unique(sizes, axis=0, return_counts=True)
    quantiles = np.linspace(0, 1, NUM_LENGTHS)
    heights, widths = (
        np.unique(np.quantile(np.repeat(lengths, counts), quantiles, method="higher"))
        for lengths in sizes.T
    )
    grid = np.stack(np.meshgrid(heights, widths, indexing="ij"), axis=-1).reshape(-1, 2)
    candidates = np.concatenate([grid[grid.prod(axis=1) >= SMALLEST], grid[-1:]])
    areas = candidates.prod(axis=1).astype(float)  # integers: their sums are exact
    padded = np.where(_holds(sizes, candidates), areas, areas[-1])  # [sizes, candidates]
    enough = ENOUGH * (counts @ sizes.prod(axis=1))
    chosen = [len(candidates) - 1]
    smallest = padded[:, -1]
    while counts @ smallest > enough and len(chosen) < MOST_RUNGS:
        best = int(np.argmin(counts @ np.minimum(padded, smallest[:, None])))
        if np.array_equal(smallest, np.minimum(padded[:, best], smallest)):
            break  # every other candidate is too small
        smallest = np.minimum(padded[:, best], smallest)
        chosen.append(best)
    taken = take(sizes, candidates[chosen])
    rungs = {tuple(sizes[(taken == rung).all(axis=1)].max(axis=0).tolist()) for rung in taken}
    return [list(rung) for rung in sorted(rungs, key=lambda rung: (rung[0] * rung[1], rung))]


def take(sizes: Int[np.ndarray, "n 2"], ladder: Int[np.ndarray, "k 2"]) -> np.ndarray:
    """Returns the rung of each image, [n, 2]: the smallest by area that holds the image.

    An image that no rung holds gets the largest height and the largest width of the ladder.
    """
    rungs = np.concatenate([ladder, ladder.max(axis=0, keepdims=True)])
    areas = rungs.prod(axis=1)
    padded = np.where(_holds(sizes, rungs), areas, areas[-1] + 1)
    padded[:, -1] = areas[-1]
    return rungs[padded.argmin(axis=1)]


def _holds(sizes: np.ndarray, rungs: np.ndarray) -> np.ndarray:
    """Returns whether each rung is at least as high and as wide as each image, bool [n, k]."""
    return np.all(sizes[:, None] <= rungs, axis=-1)
