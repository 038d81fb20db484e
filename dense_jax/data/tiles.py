"""Cuts images into overlapping tiles for evaluation and prediction.

An image of any size is covered by tiles of one size (U-Net, arXiv 1505.04597, figure 2). A *tile*
is an input of the network. The *core* of a tile is the part whose prediction is used. The cores
do not overlap, so every pixel is predicted exactly once. The *margin* on each side of the core
shows the adjacent pixels, so neighboring tiles overlap by two margins. Beyond the border of the
image, a tile shows a reflection of the image. Along one axis:

    |<-------------------------------- tile -------------------------------->|
    |<------- margin -------->|<------ core ------>|<------- margin -------->|
    |< context ->||< overlap >|                    |< overlap >||< context ->|

For example, cores of 4 pixels and margins of 2 pixels cover an axis of 10 pixels like this:

    image            0 1 2 3 4 5 6 7 8 9
    tile 0       2 1[0 1 2 3]4 5
    tile 1               2 3[4 5 6 7]8 9
    tile 2                       6 7[8 9 8 7]6 5   (the core's predictions for 8 7 are discarded)

The *context* is the part of the margin that unpadded convolutions trim, so the network makes no
prediction for it. The *overlap* is the part of the margin in which predictions from neighboring
tiles are blended, if blending is enabled. It is at most as wide as the margin minus the context.

This module uses only NumPy because worker processes run it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dense_jax.data.ladder import take
from dense_jax.geometry import reflect
from dense_jax.labels import IGNORE_LABEL

Window = tuple[slice, slice]  # rows and columns


class Place(NamedTuple):
    """The location of a tile's core, in the image and in the tile."""

    image: int  # the index of the tile's image
    in_image: Window
    in_tile: Window


class Tiles:
    """A source cut into tiles of one size, with random access to the tiles.

    tiles[k] is {"image": [th, tw, c], "label": uint8 [th, tw], "index": k}, and the `levels` of the
    whole image if the source has levels. The label is IGNORE_LABEL outside the core.

    source: An object with `sizes`, int [n, 2]. source[i] is a dict with `image` and `label`.
    tile_size: The height and width of a tile, in pixels.
    margin: The width of the margin in pixels, as one number or one per axis.
    images: A mask, bool [n], of the images to cut. If None, all images are cut.
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
        self.num_tiles = -(-np.asarray(source.sizes) // self.core)  # [n, 2], rows and columns
        if images is not None:
            self.num_tiles[~images] = 0
        self._first = np.concatenate([[0], np.cumsum(self.num_tiles.prod(axis=1))])
        self._recent: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    def place(self, k: int) -> Place:
        """Returns the location of the core of tile k."""
        image = int(np.searchsorted(self._first, k, side="right")) - 1
        start = np.array(divmod(k - self._first[image], self.num_tiles[image, 1])) * self.core
        stop = np.minimum(start + self.core, self.source.sizes[image])
        return Place(image, _window(start, stop), _window(self.margin, self.margin + stop - start))

    def shown(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the image rows [th] and columns [tw] that tile k shows, reflected at the border."""
        place = self.place(k)
        rows, columns = (
            reflect(np.arange(core.start - margin, core.start - margin + length), int(image_length))
            for core, margin, length, image_length in zip(
                place.in_image,
                self.margin,
                self.tile_size,
                self.source.sizes[place.image],
                strict=True,
            )
        )
        return rows, columns

    def of_image(self, i: int) -> range:
        """Returns the indices of the tiles of image i, row by row."""
        return range(int(self._first[i]), int(self._first[i + 1]))

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, in_image, in_tile = self.place(index)
        example = self._example(image)
        rows, columns = self.shown(index)
        label = np.full(self.tile_size, IGNORE_LABEL, np.uint8)
        label[in_tile] = example["label"][in_image]
        return {
            "image": example["image"][rows[:, None], columns],
            "label": label,
            "index": np.int64(index),
            **{name: example[name] for name in ("levels",) if name in example},
        }

    def _example(self, i: int) -> dict[str, Any]:
        # Consecutive tiles usually share an image, so a few decoded images are kept. The update is
        # a single assignment, so threads need no lock.
        example = self._recent.get(i)
        if example is None:
            example = self.source[i]
            self._recent = dict([*list(self._recent.items())[-3:], (i, example)])
        return example


def _window(start: np.ndarray, stop: np.ndarray) -> Window:
    (top, left), (bottom, right) = start.tolist(), stop.tolist()
    return slice(top, bottom), slice(left, right)


def tilings(
    source: Any,
    ladder: Sequence[Sequence[int]],
    tile_size: Sequence[int],
    margin: int,
    context: int = 0,
) -> list[Tiles]:
    """Cuts all images into tiles. Returns a `Tiles` for each combination of tile size and margin.

    Each image gets a rung of the ladder; see `ladder.take`. Each axis is handled on its own. If
    rung + 2 * context <= tile_size and the image is no longer than the rung, the image gets a single
    tile. This tile has length rung + 2 * context, and its margin is the context. So the tiles of an
    image do not depend on other images.

    source, tile_size, margin: See `Tiles`.
    ladder: The heights and widths to which images are padded, in pixels; see `ladder.choose`.
    context: The width of the context in pixels, which is the minimum margin.
    """
    sizes = np.asarray(source.sizes)
    rungs = take(sizes, np.asarray(ladder))
    fits = (rungs + 2 * context <= np.asarray(tile_size)) & (sizes <= rungs)
    lengths = np.where(fits, rungs + 2 * context, tile_size)
    margins = np.where(fits, context, max(margin, context))
    shapes = np.concatenate([lengths, margins], axis=1)
    return [
        Tiles(source, shape[:2], shape[2:], (shapes == shape).all(axis=1))
        for shape in np.unique(shapes, axis=0)
    ]
