"""Adds up what is counted of a split, where every valid pixel is counted exactly once."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from dense_jax.data import pipeline
from dense_jax.data.tiles import Tiles
from dense_jax.devices.mesh import even_batch_size, to_global
from dense_jax.devices.one_step_late import OneStepLate
from dense_jax.inference.stitching import Stitcher

# The arguments are an image's index, its predicted class map and its label map, uint8 [h, w]. With
# regions, the predictions are masks [h, w, r].
Receive = Callable[[int, np.ndarray, np.ndarray], object]


def score(
    eval_step: Callable,
    variables: Any,
    tilings: Sequence[Tiles],
    *,
    mesh: Mesh,
    batch_size: int,
    workers: int,
    per_image: bool = True,
    receive: Receive | None = None,
    num_received: int | None = None,
) -> dict[str, np.ndarray]:
    """Returns the sums over each image's tiles, [num_images, ...], by the names of `eval_step`.

    Counts are int32; to avoid overflow, sum them in int64. Other numbers are float64.

    eval_step: The result of `program.jit_eval_step`. Its first result is a dict with the "index" of
      each tile, and what is added up. If `receive` is None, it needs no second result.
    tilings: The tiles of one source; see `tiles.tilings`.
    batch_size: The largest number of tiles per step on all hosts together; see `even_batch_size`.
    per_image: Whether to return the sums of each image. If False, returns those of the split, with
      counts in int64, which needs less memory.
    receive: A function to call with each image's complete class map and label map.
    num_received: The number of images to pass to `receive`, starting with the first. If None, all.
    """
    source = tilings[0].source
    num_images = len(source)
    num_received = num_images if num_received is None else num_received
    sums = _Sums(num_images if per_image else None, receive, num_received)
    for tiles in tilings:
        batches = pipeline.eval_batches(
            tiles,
            batch_size=even_batch_size(len(tiles), batch_size, mesh),
            host=jax.process_index(),
            num_hosts=jax.process_count(),
            workers=workers,
        )
        late = OneStepLate(functools.partial(sums.add, Stitcher(tiles, whole=True)))
        bar = tqdm(total=len(tiles), unit="tile", leave=False, disable=None)
        with bar, contextlib.closing(batches):  # shuts down the workers, even after an error
            for batch in batches:
                late.put(*eval_step(variables, to_global(batch, mesh)))
                bar.update(int(np.sum(batch["index"] >= 0)))
        late.flush()
    return sums.sums


class _Sums:
    """Adds up results tile by tile, for each of `num_images` images, or for all if it is None."""

    def __init__(self, num_images: int | None, receive: Receive | None, num_received: int):
        self.sums: dict[str, np.ndarray] = {}
        self._num_images = num_images
        self._receive = receive
        self._num_received = num_received

    def add(self, stitcher: Stitcher, counted: Mapping[str, Any], maps: Any) -> None:
        """Adds the results of `eval_step` for one batch. Skips padding tiles (index -1)."""
        arrays = {name: np.asarray(array) for name, array in counted.items()}
        for k, number in enumerate(arrays.pop("index").tolist()):
            if number < 0:
                continue
            image = stitcher.tiles.place(number).image
            for name, array in arrays.items():
                if name not in self.sums:
                    self.sums[name] = self._zeros(array)
                self.sums[name][... if self._num_images is None else image] += array[k]
            if self._receive and image < self._num_received:
                blocks = {
                    name: stitcher.crop(number, np.asarray(array)[k])
                    for name, array in maps.items()
                }
                if strip := stitcher.add(number, blocks):
                    self._receive(image, strip.maps["classes"], strip.maps["label"])

    def _zeros(self, array: np.ndarray) -> np.ndarray:
        """Returns the start of the sums of arrays [batch_size, ...]."""
        if self._num_images is None:
            return np.zeros(array.shape[1:], np.int64 if array.dtype == np.int32 else np.float64)
        dtype = np.int32 if array.dtype == np.int32 else np.float64
        return np.zeros((self._num_images, *array.shape[1:]), dtype)
