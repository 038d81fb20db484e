"""Random-access sources -> batches of numpy arrays for this host.

The only module that knows about hosts. The position in the data is a function of the step alone,
so nothing here has a state to save: a stream is started at a step. Batches do not depend on the
number of hosts or workers: global batch k of a run always holds the examples k * batch_size, ...,
(k + 1) * batch_size - 1 of the run, and host j of n gets every n-th of them from the j-th on.
"""

import functools
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from dense_jax.data.source import Examples, Field
from dense_jax.data.workers import end_with_parent
from dense_jax.labels import IGNORE_LABEL

# Else a note on frames of Grain's follows every message of a source.
grain.config.update("py_traceback_filtering", "off")


def train_batches(
    source: Examples | Sequence[dict[str, Any]],
    *,
    canvas: tuple[int, int] | None,
    seed: int,
    batch_size: int,
    step: int = 0,
    host: int = 0,
    num_hosts: int = 1,
    workers: int = 0,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless and shuffled anew each epoch; starts where a run that has done `step` steps goes on.

    `batch_size` is global; `canvas` is (height, width) in pixels; `workers` are processes, 0 means
    threads in this one. Each batch holds, for the b = batch_size / num_hosts examples of this host:
        image  uint8 [b, height, width, c]
        label  uint8 [b, height, width]; IGNORE_LABEL off the example
        size   int32 [b, 2], the height and width of the canvas that hold the example, in pixels
        index  uint32 [b], the example's number in the run: a key for its augmentation
        name   str [b]
    and an array [b, height, width] for each of the source's fields.
    If `canvas` is None, examples stay as they are, in the same order, and only get an `index`.
    """
    host_batch = _host_batch(batch_size, num_hosts)
    # Numbers in the run. They end where `index` does, because grain cannot count the batches of one
    # in what is endless.
    dataset = grain.MapDataset.range(step * batch_size + host, 2**32, num_hosts)
    dataset = dataset.map(functools.partial(_draw, source, canvas, seed))
    return _iterate(dataset.batch(host_batch), workers)


def eval_batches(
    tiles: grain.sources.RandomAccessDataSource,
    *,
    batch_size: int,
    host: int = 0,
    num_hosts: int = 1,
    workers: int = 0,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Each tile exactly once over all hosts, in as many full batches on every host.

    A tile is a dict with at least `image`, `label` and an integer `index`, all of equal shapes;
    labels leave as uint8. Each host gets one contiguous block, so that it decodes few images
    twice. The tail is padded with tiles whose labels are all IGNORE_LABEL and whose index is -1.
    """
    host_batch = _host_batch(batch_size, num_hosts)
    num_batches = -(-len(tiles) // batch_size)
    block = _Block(tiles, start=host * num_batches * host_batch, length=num_batches * host_batch)
    return _iterate(grain.MapDataset.source(block).batch(host_batch), workers)


def join(batches: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """Batches of several streams, one after the other."""
    if len(batches) == 1:
        return batches[0]
    return {field: np.concatenate([batch[field] for batch in batches]) for field in batches[0]}


def _host_batch(batch_size: int, num_hosts: int) -> int:
    if batch_size % num_hosts:
        raise ValueError(f"batch_size {batch_size} is not divisible by {num_hosts} hosts")
    return batch_size // num_hosts


def _draw(
    source: Examples | Sequence[dict[str, Any]],
    canvas: tuple[int, int] | None,
    seed: int,
    index: int,
) -> dict[str, Any]:
    """Returns example number `index` of the run; (seed, index) draws its window on the canvas."""
    epoch, position = divmod(index, len(source))
    example = source[int(_order(len(source), seed, epoch)[position])]
    if canvas is not None:
        assert isinstance(source, Examples)
        rng = np.random.Generator(np.random.Philox(key=[seed, index]))
        example = fit(example, canvas, rng, source.fields)
    return dict(example, index=np.uint32(index))


def fit(
    example: dict[str, Any],
    canvas: tuple[int, int],
    rng: np.random.Generator,
    fields: Sequence[Field] = (),
) -> dict[str, Any]:
    """Puts an example onto a canvas of fixed (height, width) in pixels, at the top left.

    An axis that is too long is cut to a window drawn from `rng`. An axis that is too short is filled
    up: the image with 0, the label with IGNORE_LABEL, each field with its `fill`. The label becomes
    uint8. Adds `size`: the int32 height and width, in pixels, that hold the example.
    """
    window, size = [], []
    for length, room in zip(example["label"].shape, canvas, strict=True):
        start = int(rng.integers(length - room + 1)) if length > room else 0
        size.append(min(length, room))
        window.append(slice(start, start + size[-1]))
    fitted = dict(example, size=np.array(size, np.int32))
    fills = {"image": 0, "label": IGNORE_LABEL} | {field.name: field.fill for field in fields}
    for name, fill in fills.items():
        array = example[name][tuple(window)]
        if name == "label":
            array = array.astype(np.uint8, copy=False)
        if tuple(size) != canvas:
            on_canvas = np.full((*canvas, *array.shape[2:]), fill, array.dtype)
            on_canvas[: size[0], : size[1]] = array
            array = on_canvas
        fitted[name] = array
    return fitted


@functools.lru_cache(maxsize=32)  # of several seeds
def _order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """An epoch's permutation. Grain's shuffle takes milliseconds per example of a small dataset."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def _iterate(batches: grain.MapDataset, workers: int) -> grain.DatasetIterator:
    # Batches are formed before the work is shared out, so that workers take turns at whole
    # batches and none depends on how many they are. Grain's own buffer of 500 elements would
    # hold hundreds of GB of large images. Each worker reads on while it decodes.
    num_threads = 2 if workers else 4
    dataset = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    )
    if workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_start_worker
        )
    return iter(dataset)


def _start_worker(worker: int, num_workers: int) -> None:
    """Ends a worker process with the training process, however that ends, and not before.

    A Ctrl-C, or a launcher's SIGTERM to the whole group, must leave training its data: it saves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


class _Block:
    """`length` tiles from `start` on, with padding past the last."""

    def __init__(self, tiles: grain.sources.RandomAccessDataSource, *, start: int, length: int):
        self._tiles = tiles
        self._start = start
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        k = self._start + index
        tile = dict(self._tiles[min(k, len(self._tiles) - 1)])
        tile["label"] = tile["label"].astype(np.uint8)
        if k >= len(self._tiles):
            tile["label"] = np.full_like(tile["label"], IGNORE_LABEL)
            tile["index"] = np.full_like(tile["index"], -1)
        return tile
