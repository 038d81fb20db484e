"""Exact evaluation of a split: every valid pixel of every image counted exactly once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from dense_jax.data import pipeline
from dense_jax.data.tiles import Tiles
from dense_jax.devices import mesh as meshes


def predict_tiles(
    step: Callable, variables: Any, tiles: Tiles, *, mesh: Mesh, batch_size: int, workers: int
) -> Iterator[tuple[list[int], Any]]:
    """Runs `step(variables, batch)` over all tiles; yields this host's tile numbers and outputs.

    batch_size: tiles per step over all hosts, rounded up to a multiple of the devices. Padding has
    the tile number -1. Outputs come one batch late, so that the device never waits for the host.
    """
    batches = pipeline.eval_batches(
        tiles,
        batch_size=-(-batch_size // mesh.size) * mesh.size,
        host=jax.process_index(),
        num_hosts=jax.process_count(),
        workers=workers,
    )
    pending = None
    bar = tqdm(total=len(tiles), unit="tile", leave=False, disable=None)
    with bar, contextlib.closing(batches):  # ends the workers, also after an error
        for batch in batches:
            numbers = batch["index"].tolist()
            outputs = step(variables, meshes.to_global(batch, mesh))
            if pending is not None:
                yield pending
            pending = numbers, outputs
            bar.update(sum(k >= 0 for k in numbers))
    if pending is not None:
        yield pending


def score(
    eval_step: Callable,
    variables: Any,
    tilings: Sequence[Tiles],
    *,
    mesh: Mesh,
    per_image: bool = True,
    receive: Callable[[int, np.ndarray, np.ndarray], object] | None = None,
    num_received: int | None = None,
    **options: int,
) -> np.ndarray:
    """Returns each image's confusion matrix, int32 [n, c, c]: to add them up, use int64.

    tilings: the tiles of one source; see `tiles.tilings`.
    per_image: False returns the sum alone, int64 [c, c]: [n, c, c] may not fit into memory.
    eval_step: as of `steps.make_eval_step`, mapped over batches, its results replicated: every host
      gets all of them.
    receive: called with index, predicted classes and label, uint8 [h, w], of each of the first
      num_received images, or of all.
    """
    matrices: Any = None
    num_images = len(tilings[0].source)
    last = num_images if num_received is None else num_received
    for tiles in tilings:
        stitcher = Stitcher(tiles)
        for _, (counted, maps) in predict_tiles(eval_step, variables, tiles, mesh=mesh, **options):
            numbers, counts = np.asarray(counted["index"]).tolist(), np.asarray(counted["counts"])
            images = [tiles.place(k)[0] if k >= 0 else -1 for k in numbers]  # -1: padding
            if matrices is None:
                shape = (num_images, *counts.shape[1:]) if per_image else counts.shape[1:]
                matrices = np.zeros(shape, np.int32 if per_image else np.int64)
            for i, of_tile in zip(images, counts, strict=True):
                if i >= 0:
                    matrices[i if per_image else ...] += of_tile
            wanted = [j for j, i in enumerate(images) if 0 <= i < last]
            if receive and wanted:
                chosen = [numbers[j] for j in wanted]
                for i, whole in stitcher.add(chosen, np.asarray(maps)[wanted]):
                    receive(i, whole[..., 0], whole[..., 1])
    return matrices


class Stitcher:
    """Puts the cores of tiles together; they may come in any order."""

    def __init__(self, tiles: Tiles):
        self._tiles = tiles
        self._unfinished: dict[int, tuple[np.ndarray, int]] = {}

    def add(self, numbers: list[int], maps: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Takes uint8 maps [b, th, tw, ...] of tiles by number, -1 for padding; returns, as index in
        the source and map [h, w, ...], the images now complete.
        """
        complete = []
        for k, tile in zip(numbers, maps, strict=True):
            if k < 0:
                continue
            i, in_image, in_tile = self._tiles.place(k)
            canvas, missing = self._unfinished.pop(i, (None, self._tiles.num_tiles[i].prod()))
            if canvas is None:
                canvas = np.empty((*self._tiles.source.sizes[i], *tile.shape[2:]), np.uint8)
            canvas[in_image] = tile[in_tile]
            if missing == 1:
                complete.append((i, canvas))
            else:
                self._unfinished[i] = canvas, missing - 1
        return complete
