"""Images from the top down into tiles, and maps of tiles into rows of whole images. Numpy only.

The geometry is that of `Tiles`: cores that partition the image. With an `overlap`, the tiles also
count that far beyond their cores, and are blended there: a seam is where nothing changes abruptly.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from dense_jax.data.tiles import Tiles


class Piece(NamedTuple):
    """Tile `number`; with the last one of a row of tiles, the image's own rows of its blocks."""

    number: int
    image: UInt8[np.ndarray, "th tw c"]
    rows: UInt8[np.ndarray, "_ w c"] | None


class Failure(NamedTuple):
    """An image that could not be read to its end, by its number, and why."""

    index: int
    problem: Exception


class Mosaic:
    """Puts the maps of tiles together, in the order of their numbers.

    overlap: pixels by which tiles count beyond their cores, at most the margin, on each axis.

    A pixel that several tiles reach gets sum_k w_k map_k, on each axis with
    w_k = g_k / sum_j g_j over the tiles that reach it: g_k is a Gaussian around the tile's middle,
    its standard deviation an eighth of the tile (nnU-Net, Isensee et al. 2021). The sum is made in
    steps, map += g_k / (g_1 + ... + g_k) (map_k - map): no weight is divided out afterwards, and
    where all tiles agree, nothing changes by a bit.
    """

    def __init__(self, tiles: Tiles, overlap: Sequence[int] | np.ndarray):
        self._tiles = tiles
        self.overlap = tuple(map(int, overlap))
        self._core = tuple(map(int, tiles.core))
        self._left = self._top = np.empty(0)  # what tiles to come will change, blended so far

    def block(self, number: int) -> tuple[int, slice, slice]:
        """The image of a tile, and the rows and columns that are complete with it, and no earlier."""
        i, in_image, _ = self._tiles.place(number)
        rows, columns = (
            slice(max(0, s.start - o), n if s.stop == n else max(0, s.stop - o))
            for s, o, n in zip(in_image, self.overlap, self._size(i), strict=True)
        )
        return i, rows, columns

    def add(self, number: int, of_tile: np.ndarray) -> np.ndarray:
        """Takes the map of a tile, [th, tw, k] where tiles are blended; returns that of its block."""
        i, in_image, in_tile = self._tiles.place(number)
        if self.overlap == (0, 0):
            return of_tile[in_tile]
        _, rows, columns = self.block(number)
        core, reach = self._core, tuple(2 * o for o in self.overlap)
        window = tuple(
            slice(s.start - o, s.start + n + o)
            for s, o, n in zip(in_tile, self.overlap, core, strict=True)
        )
        new = np.array(of_tile[window])
        top, left = (s.start - o for s, o in zip(in_image, self.overlap, strict=True))
        k = in_image[1].start // core[1]
        if k:
            _blend(new[:, : reach[1]], self._left, self.share(1, k)[:, None])
        self._left = new[:, core[1] :]
        new = new[:, columns.start - left : columns.stop - left]
        k = in_image[0].start // core[0]
        if k:
            _blend(new[: reach[0]], self._top[:, columns], self.share(0, k)[:, None, None])
        elif in_image[1].start == 0:
            self._top = np.empty((reach[0], self._size(i)[1], *new.shape[2:]), new.dtype)
        self._top[:, columns] = new[core[0] :]
        return new[rows.start - top : rows.stop - top]

    def share(self, axis: int, k: int) -> Float32[np.ndarray, "reach"]:
        """g_k / (g_1 + ... + g_k) of the k-th tile, k > 0, on the pixels that earlier ones reach."""
        core, overlap = self._core[axis], self.overlap[axis]
        length = core + 2 * overlap
        # From the start of this tile, and of the earlier ones that reach so far.
        x = np.arange(2 * overlap) + core * np.arange(min(k, (length - 1) // core) + 1)[:, None]
        gaussian = np.exp(-0.5 * ((x - (length - 1) / 2) / (length / 8)) ** 2) * (x < length)
        return (gaussian[0] / gaussian.sum(axis=0)).astype(np.float32)

    def _size(self, i: int) -> tuple[int, int]:
        height, width = map(int, self._tiles.source.sizes[i])
        return height, width


def _blend(new: np.ndarray, earlier: np.ndarray, share: np.ndarray) -> None:
    new -= earlier
    new *= share
    new += earlier


def cut(images: Any, tiles: Tiles, mosaic: Mosaic) -> Iterator[Piece | Failure]:
    """The tiles of all images that have any, in order; what is broken in an image ends it.

    images: has `sizes`, int [n, 2], and strips(i), the rows of an image from the top down, as an
      iterator of uint8 [_, w, c] that raises ValueError where the file is broken. Of its rows, no
      more are kept than a row of tiles shows.
    """
    for i in np.flatnonzero(tiles.num_tiles.all(axis=1)).tolist():
        try:
            read = _reader(images.strips(i), int(images.sizes[i][0]))
            for number in tiles.of_image(i):
                rows, columns = tiles.shown(number)
                start, held = read(int(rows.min()), int(rows.max()) + 1)
                _, of_block, up_to = mosaic.block(number)
                last = up_to.stop == images.sizes[i][1]
                yield Piece(
                    number,
                    held[(rows - start)[:, None], columns],
                    held[of_block.start - start : of_block.stop - start] if last else None,
                )
        except (OSError, ValueError) as problem:
            yield Failure(i, problem)


def _reader(
    strips: Iterator[np.ndarray], height: int
) -> Callable[[int, int], tuple[int, np.ndarray]]:
    """Returns read(start, stop) -> the number of the first row that is held, and those rows.

    From call to call, neither start nor stop may decrease: rows above start are forgotten.
    """
    first, held = 0, next(strips)

    def read(start: int, stop: int) -> tuple[int, np.ndarray]:
        nonlocal first, held
        if first + len(held) < stop:
            parts = [held[start - first :]]
            first, num_rows = start, len(parts[0])
            while first + num_rows < stop:
                strip = next(strips, None)
                if strip is None:
                    raise ValueError(
                        f"ended after {first + num_rows} rows, but {height} were expected"
                    )
                parts.append(strip)
                num_rows += len(strip)
            held = np.concatenate(parts)
        return first, held

    return read
