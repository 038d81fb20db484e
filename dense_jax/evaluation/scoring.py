"""Computes confusion matrices in which every valid pixel of a split is counted exactly once."""

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

# The arguments are an image's index, its predicted class map and its label map, uint8 [h, w].
Receive = Callable[[int, np.ndarray, np.ndarray], object]


def score(
    eval_step: Callable,
    variables: Any,
    tilings: Sequence[Tiles],
    *,
    num_classes: int,
    mesh: Mesh,
    batch_size: int,
    workers: int,
    per_image: bool = True,
    receive: Receive | None = None,
    num_received: int | None = None,
) -> np.ndarray:
    """Returns the confusion matrix of each image, int32 [num_images, num_classes, num_classes].

    To avoid overflow, sum the matrices in int64.

    eval_step: The result of `program.jit_eval_step`.
    tilings: The tiles of one source; see `tiles.tilings`.
    batch_size: The largest number of tiles per step on all hosts together; see `even_batch_size`.
    per_image: Whether to return one matrix per image. If False, returns their sum, int64
      [num_classes, num_classes], which needs less memory.
    receive: A function to call with each image's complete class map and label map.
    num_received: The number of images to pass to `receive`, starting with the first. If None, all.
    """
    source = tilings[0].source
    num_images = len(source)
    shape = num_classes, num_classes
    matrices = np.zeros((num_images, *shape), np.int32) if per_image else np.zeros(shape, np.int64)
    scores = _Scores(matrices, receive, num_images if num_received is None else num_received)
    for tiles in tilings:
        batches = pipeline.eval_batches(
            tiles,
            batch_size=even_batch_size(len(tiles), batch_size, mesh),
            host=jax.process_index(),
            num_hosts=jax.process_count(),
            workers=workers,
        )
        late = OneStepLate(functools.partial(scores.add, Stitcher(tiles, whole=True)))
        bar = tqdm(total=len(tiles), unit="tile", leave=False, disable=None)
        with bar, contextlib.closing(batches):  # shuts down the workers, even after an error
            for batch in batches:
                late.put(*eval_step(variables, to_global(batch, mesh)))
                bar.update(int(np.sum(batch["index"] >= 0)))
        late.flush()
    return scores.matrices


class _Scores:
    """Adds up confusion matrices tile by tile, for each image or for all images together."""

    def __init__(self, matrices: np.ndarray, receive: Receive | None, num_received: int):
        self.matrices = matrices
        self._receive = receive
        self._num_received = num_received

    def add(self, stitcher: Stitcher, counted: Mapping[str, Any], maps: Any) -> None:
        """Adds the results of `eval_step` for one batch. Skips padding tiles (index -1)."""
        counts = np.asarray(counted["counts"])
        for k, number in enumerate(np.asarray(counted["index"]).tolist()):
            if number < 0:
                continue
            image = stitcher.tiles.place(number).image
            self.matrices[image if self.matrices.ndim == 3 else ...] += counts[k]
            if self._receive and image < self._num_received:
                block = stitcher.crop(number, np.asarray(maps)[k])
                maps_by_name = {"classes": block[..., 0], "label": block[..., 1]}
                if strip := stitcher.add(number, maps_by_name):
                    self._receive(image, strip.maps["classes"], strip.maps["label"])
