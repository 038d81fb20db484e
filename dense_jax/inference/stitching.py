"""Reads images from top to bottom, cuts them into tiles, and stitches the tiles' predictions.

Evaluation and prediction use the same `Stitcher`. `Tiles` defines the tiles, whose cores
partition each image. If `overlap` > 0, each tile also contributes `overlap` pixels beyond its core.
Overlapping predictions are blended, so that no seams are visible. Uses NumPy only.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Shaped

from dense_jax.data.levels import Rule, filled
from dense_jax.data.tiles import Place, Tiles


@runtime_checkable
class Images(Protocol):
    """Images that are read in strips of rows. `sizes` are the image sizes in pixels, int [n, 2]."""

    sizes: np.ndarray

    def strips(self, i: int) -> Iterator[np.ndarray]:
        """Yields the rows of image i from top to bottom, as arrays [_, w, c].

        If the image declares a nodata value, they are masked arrays; see `decode.convert`.

        Raises ValueError or OSError at a broken part of the file.
        """
        ...


class Tile(NamedTuple):
    """The index of a tile in a `Tiles` object, its pixels, and the levels of its image if any.

    nodata: Marks the missing pixels, if the image declares a value for them.
    """

    number: int
    image: Shaped[np.ndarray, "th tw c"]
    levels: Float32[np.ndarray, "2 c"] | None = None
    nodata: Bool[np.ndarray, "th tw"] | None = None


class Failure(NamedTuple):
    """The index of an image that could not be read completely, and the error."""

    index: int
    problem: Exception


class Strip(NamedTuple):
    """The rows `start` to `stop` of image `index`: {map name: array [stop - start, w, ...]}."""

    index: int
    start: int
    stop: int
    maps: dict[str, np.ndarray]


class Stitcher:
    """Stitches per-pixel maps of tiles into strips. Each row of tiles completes one strip.

    Without overlap, tiles may be added in any order. With overlap, the tile numbers must increase.

    overlap: How far a tile's contribution extends beyond its core, in pixels, vertically and
      horizontally. It must not exceed the margin.
    whole: Whether all rows of tiles of an image form a single strip.

    If several tiles cover a pixel, its value is a weighted mean of the tiles' values. The weights
    of a tile are a Gaussian at the center of the tile, with a standard deviation of
    (core + 2 * overlap) / 8 per axis (nnU-Net, Isensee et al. 2021).
    """

    def __init__(
        self, tiles: Tiles, overlap: Sequence[int] | np.ndarray = (0, 0), *, whole: bool = False
    ):
        self.tiles = tiles
        self.overlap = tuple(map(int, overlap))
        self._whole = whole
        self._core = tuple(map(int, tiles.core))
        # Incomplete strips by image and first row, each with the number of missing tiles.
        self._strips: dict[tuple[int, int], tuple[Strip, int]] = {}
        # Blended values that the next tile on the right, and the next row of tiles, will update.
        self._left = self._top = np.empty(0)

    def block(self, number: int) -> Place:
        """Returns the location of a tile's block, in the image and in the tile.

        The block is the region whose values are final once the tile is added. Like the cores, the
        blocks partition the image.
        """
        image, in_image, in_tile = self.tiles.place(number)
        size = self.tiles.source.sizes[image].tolist()
        windows = []
        for s, t, o, n in zip(in_image, in_tile, self.overlap, size, strict=True):
            start, stop = max(0, s.start - o), n if s.stop == n else max(0, s.stop - o)
            shift = t.start - s.start
            windows.append((slice(start, stop), slice(start + shift, stop + shift)))
        (rows, tile_rows), (columns, tile_columns) = windows
        return Place(image, (rows, columns), (tile_rows, tile_columns))

    def crop(self, number: int, tile_map: np.ndarray) -> np.ndarray:
        """Crops a tile's map [th, tw, ...] to the block of the tile."""
        return tile_map[self.block(number).in_tile]

    def blend(self, number: int, tile_map: np.ndarray) -> np.ndarray:
        """Returns the block of a tile's map [th, tw, k], blended with earlier overlapping tiles."""
        if self.overlap == (0, 0):
            return self.crop(number, tile_map)
        _, in_image, in_tile = self.tiles.place(number)
        image, (rows, columns), _ = self.block(number)
        reach = tuple(2 * o for o in self.overlap)
        window = tuple(
            slice(s.start - o, s.start + n + o)
            for s, o, n in zip(in_tile, self.overlap, self._core, strict=True)
        )
        new = np.array(tile_map[window])
        # Tile k updates the mean along an axis: map += g_k / (g_0 + ... + g_k) * (map_k - map). A
        # value on which all tiles agree stays bitwise the same.
        top, left = (s.start - o for s, o in zip(in_image, self.overlap, strict=True))
        row, column = (s.start // n for s, n in zip(in_image, self._core, strict=True))
        if column:
            _move(new[:, : reach[1]], self._left, self.share(1, column)[:, None])
        self._left = new[:, self._core[1] :]
        new = new[:, columns.start - left : columns.stop - left]
        if row:
            _move(new[: reach[0]], self._top[:, columns], self.share(0, row)[:, None, None])
        elif column == 0:
            width = self.tiles.source.sizes[image, 1]
            self._top = np.empty((reach[0], width, *new.shape[2:]), new.dtype)
        self._top[:, columns] = new[self._core[0] :]
        return new[rows.start - top : rows.stop - top]

    def share(self, axis: int, k: int) -> Float32[np.ndarray, "reach"]:
        """Returns the weight of tile k along `axis` at the pixels that tile k - 1 also covers.

        The weight at a position is g_k / (g_0 + ... + g_k), where g_j is the Gaussian of tile j.
        """
        core, overlap = self._core[axis], self.overlap[axis]
        length = core + 2 * overlap
        # Positions relative to the starts of this tile and of the earlier tiles that overlap it.
        x = np.arange(2 * overlap) + core * np.arange(min(k, (length - 1) // core) + 1)[:, None]
        gaussian = np.exp(-0.5 * ((x - (length - 1) / 2) / (length / 8)) ** 2) * (x < length)
        return (gaussian[0] / gaussian.sum(axis=0)).astype(np.float32)

    def add(self, number: int, maps: Mapping[str, np.ndarray]) -> Strip | None:
        """Adds the maps of a tile's block. Returns the strip that this tile completes, or None."""
        index, (rows, columns), _ = self.block(number)
        height, width = self.tiles.source.sizes[index].tolist()
        num_rows, num_columns = self.tiles.num_tiles[index].tolist()
        start, stop = (0, height) if self._whole else (rows.start, rows.stop)
        strip, missing = self._strips.pop((index, start), (None, num_columns))
        if strip is None:
            canvases = {
                name: np.empty((stop - start, width, *block.shape[2:]), block.dtype)
                for name, block in maps.items()
            }
            strip = Strip(index, start, stop, canvases)
            missing *= num_rows if self._whole else 1
        for name, block in maps.items():
            strip.maps[name][rows.start - start : rows.stop - start, columns] = block
        if missing > 1:
            self._strips[index, start] = strip, missing - 1
            return None
        return strip if start < stop else None  # cores within the first overlap complete no row

    def forget(self, index: int) -> None:
        """Drops the incomplete strips of an image."""
        self._strips = {key: value for key, value in self._strips.items() if key[0] != index}


def _move(new: np.ndarray, earlier: np.ndarray, share: np.ndarray) -> None:
    """Sets `new` to earlier + share * (new - earlier), in place."""
    new -= earlier
    new *= share
    new += earlier


def cut(images: Images, tiles: Tiles, levels_of: Rule | None = None) -> Iterator[Tile | Failure]:
    """Yields the tiles of `images` in order. Holds about one row of tiles in memory.

    levels_of: How the levels of an image are found, or None.

    If an image cannot be read completely, a `Failure` replaces its remaining tiles.
    """
    for i in np.flatnonzero(tiles.num_tiles.all(axis=1)).tolist():
        try:
            levels, strips = None, images.strips(i)
            if levels_of is not None:
                levels, strips = levels_of.read(
                    functools.partial(images.strips, i), images.sizes[i].tolist()
                )
            reader = _Reader(strips, int(images.sizes[i][0]))
            for number in tiles.of_image(i):
                rows, columns = tiles.shown(number)
                first, pixels = reader.read(int(rows.min()), int(rows.max()) + 1)
                shown = pixels[(rows - first)[:, None], columns]
                is_masked = isinstance(shown, np.ma.MaskedArray)
                nodata = np.ma.getmaskarray(shown)[..., 0] if is_masked else None
                yield Tile(number, filled(shown, levels), levels, nodata)
        except (OSError, ValueError) as problem:
            yield Failure(i, problem)


class _Reader:
    """Reads ranges of rows from an image that arrives in strips."""

    def __init__(self, strips: Iterator[np.ndarray], height: int):
        self._strips, self._height = strips, height
        self._first, self._rows = 0, next(strips)

    def read(self, start: int, stop: int) -> tuple[int, np.ndarray]:
        """Returns (first, rows). `rows` begins at row `first` and includes rows `start` to `stop`.

        `start` and `stop` must not decrease between calls, because earlier rows are dropped.
        """
        if self._first + len(self._rows) < stop:
            parts = [self._rows[start - self._first :]]
            end = start + len(parts[0])
            while end < stop:
                strip = next(self._strips, None)
                if strip is None:
                    raise ValueError(f"ended after {end} rows, but {self._height} were expected")
                parts.append(strip)
                end += len(strip)
            is_masked = isinstance(parts[0], np.ma.MaskedArray)
            join = np.ma.concatenate if is_masked else np.concatenate
            self._first, self._rows = start, join(parts)
        return self._first, self._rows
