"""Overlap-tile geometry (U-Net, arXiv 1505.04597, figure 2), shared by evaluation and prediction.

An image of any size is covered by tiles of one size. A tile is a core, whose pixels are predicted
from it, inside `margin` pixels of context on every side, mirrored where the image ends. The cores
partition the image: every pixel is predicted exactly once. Numpy only; runs in worker processes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dense_jax.labels import IGNORE_LABEL


class Tiles:
    """A source cut into tiles: itself a random-access source of equal examples.

    tiles[index]: `image` uint8 [th, tw, c], `label` [th, tw] with IGNORE_LABEL outside the core, and
    `index`.

    source: has `sizes`, int [n, 2], and source[i] with `image`, `label`.
    tile_size: height and width with the margins, in pixels. A smaller image is mirrored up to that.
    margin: in pixels, of both axes or of each.
    images: which of the source's images, bool [n]; the others have no tiles. By default all.
    """

    def __init__(
        self,
        source: Any,
        tile_size: Sequence[int] | np.ndarray,
        margin: int | np.ndarray,
        images: np.ndarray | None = None,
    ):
        self.source = source
        self.tile_size = np.asarray(tile_size)
        self.margin = np.broadcast_to(margin, 2)
        self.core = self.tile_size - 2 * self.margin
        if min(self.core) < 1:
            raise ValueError(
                f"tiles of {tuple(self.tile_size.tolist())} pixels have no core inside a margin of "
                f"{max(self.margin)} pixels: the tile must be larger than twice the margin"
            )
        self.num_tiles = -(-np.asarray(source.sizes) // self.core)  # rows and columns, per image
        if images is not None:
            self.num_tiles[~images] = 0
        self._first = np.concatenate([[0], np.cumsum(self.num_tiles.prod(axis=1))])
        self._recent: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    def place(self, k: int) -> tuple[int, tuple[slice, ...], tuple[slice, ...]]:
        """The image that tile k belongs to, its core in that image, and its core in the tile."""
        i = int(np.searchsorted(self._first, k, side="right")) - 1
        start = np.array(divmod(k - self._first[i], self.num_tiles[i, 1])) * self.core
        length = np.minimum(self.core, self.source.sizes[i] - start)
        in_image = tuple(slice(int(a), int(a + n)) for a, n in zip(start, length, strict=True))
        in_tile = tuple(slice(int(m), int(m + n)) for m, n in zip(self.margin, length, strict=True))
        return i, in_image, in_tile

    def shown(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows and the columns of its image that tile k shows, mirrored where the image ends."""
        i, in_image, _ = self.place(k)
        rows, columns = (
            mirrored(range(s.start - m, s.start - m + t), int(n))
            for s, m, t, n in zip(
                in_image, self.margin, self.tile_size, self.source.sizes[i], strict=True
            )
        )
        return rows, columns

    def of_image(self, i: int) -> range:
        """The numbers of an image's tiles, row by row."""
        return range(int(self._first[i]), int(self._first[i + 1]))

    def __getitem__(self, index: int) -> dict[str, Any]:
        i, in_image, in_tile = self.place(index)
        example = self._example(i)
        rows, columns = self.shown(index)  # only this is mirrored, not the whole image
        label = np.full(self.tile_size, IGNORE_LABEL, np.uint8)
        label[in_tile] = example["label"][in_image]
        return {
            "image": example["image"][rows[:, None], columns],
            "label": label,
            "index": np.int64(index),
        }

    def _example(self, i: int) -> dict[str, Any]:
        # Neighboring tiles are read one after the other: keep a few decoded images at hand.
        # One assignment, so that reader threads need no lock.
        example = self._recent.get(i)
        if example is None:
            example = self.source[i]
            self._recent = dict([*list(self._recent.items())[-3:], (i, example)])
        return example


def tilings(
    source: Any,
    image_size: Sequence[int],
    tile_size: Sequence[int],
    margin: int,
    context: int = 0,
) -> list[Tiles]:
    """Cuts each image of a source in a way that depends on that image and the run alone.

    Returns the tiles of each geometry that occurs: as a rule one, at most four.

    source, tile_size, margin: see `Tiles`.
    image_size: the largest height and width of the run's images, in pixels. An axis on which that
      fits into a tile is as long, and has no margin but `context`, for images that are no longer.
    context: the margin, in pixels, that the network cannot do without: no axis has less.
    """
    longest = np.asarray(image_size) + 2 * context
    fits = (longest <= np.asarray(tile_size)) & (np.asarray(source.sizes) <= image_size)
    return [
        Tiles(
            source,
            np.where(axes, longest, tile_size),
            np.where(axes, context, max(margin, context)),
            np.all(fits == axes, axis=1),
        )
        for axes in np.unique(fits, axis=0)[::-1]
    ]


def mirrored(positions: range, size: int) -> np.ndarray:
    """Positions on an axis of `size` pixels, reflected about the centers of its border pixels."""
    last = size - 1
    return last - np.abs(np.mod(positions, max(2 * last, 1)) - last).clip(0, last)
