"""Overlapping tiles (U-Net, arXiv 1505.04597, figure 2), for evaluation and prediction alike.

An image of any size is covered by tiles of one size. A *tile* is the network's input. Its *core* is
the part whose prediction is used. The cores partition the image, so that every pixel is predicted
exactly once. The *margin* on each side of the core shows the pixels next to it, so that neighboring
tiles share two margins. Where the image ends, the margin shows its reflection. Along one axis:

    |<-------------------------------- tile -------------------------------->|
    |<------- margin -------->|<------ core ------>|<------- margin -------->|
    |< context ->||< overlap >|                    |< overlap >||< context ->|

Cores of 4 pixels and margins of 2 on an image that has 10 pixels on this axis:

    image            0 1 2 3 4 5 6 7 8 9
    tile 0       2 1[0 1 2 3]4 5
    tile 1               2 3[4 5 6 7]8 9
    tile 2                       6 7[8 9 8 7]6 5

The *context* is the part of the margin that a network with unpadded convolutions uses up: it makes
no prediction there. The *overlap* is the part in which predictions of neighboring tiles are blended,
if the user asks for that; it may be as wide as the margin without the context.

Numpy only, because worker processes run it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dense_jax.geometry import reflect
from dense_jax.labels import IGNORE_LABEL

Window = tuple[slice, slice]  # rows and columns


class Place(NamedTuple):
    """Where the core of a tile lies."""

    image: int  # the number of the tile's image
    in_image: Window
    in_tile: Window


class Tiles:
    """A source cut into tiles: random access to examples of one size.

    tiles[k] is {"image": uint8 [th, tw, c], "label": uint8 [th, tw], "index": k}. The label is
    IGNORE_LABEL outside the core.

    source: has `sizes`, int [n, 2], and source[i] with `image` and `label`.
    tile_size: the height and width of a tile, in pixels.
    margin: in pixels, for both axes or for each.
    images: bool [n], the images of the source to cut; the others have no tiles. By default all.
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

    def place(self, k: int) -> Place:
        """Returns where the core of tile k lies, in its image and in the tile."""
        image = int(np.searchsorted(self._first, k, side="right")) - 1
        start = np.array(divmod(k - self._first[image], self.num_tiles[image, 1])) * self.core
        stop = np.minimum(start + self.core, self.source.sizes[image])
        return Place(image, _window(start, stop), _window(self.margin, self.margin + stop - start))

    def shown(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows and the columns of its image that tile k shows, reflected outside."""
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
        """Returns the numbers of an image's tiles, row by row."""
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
        }

    def _example(self, i: int) -> dict[str, Any]:
        # Neighboring tiles are read one after the other, so a few decoded images are kept.
        # This is a single assignment, so that threads need no lock.
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
    image_size: Sequence[int],
    tile_size: Sequence[int],
    margin: int,
    context: int = 0,
) -> list[Tiles]:
    """Cuts every image of a source in a way that depends on that image and the run alone.

    Returns one `Tiles` for each geometry that occurs: as a rule one, at most four.

    source, tile_size, margin: see `Tiles`.
    image_size: the largest height and width of the run's images, in pixels. An axis on which that
      size fits into a tile gets tiles of that size, without a margin but the context, for every
      image that is no longer.
    context: in pixels; no margin is smaller.
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
