"""Makes batches of NumPy arrays for this host from random-access sources.

In training, global batch k holds examples k * batch_size to (k + 1) * batch_size - 1 of the run.
Host j of n gets the j-th of n equal blocks of each global batch. Global batches, and the order of
their examples, depend only on the source, the seed and the step, not on the number of hosts or
workers. Therefore a stream can start at any step and has no state to save.
"""

import functools
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float64

from dense_jax.data.source import Examples, Field
from dense_jax.data.workers import end_with_parent
from dense_jax.labels import IGNORE_LABEL

# Otherwise Grain adds a note about hidden traceback frames to every error message from a source.
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
    repeats: Float64[np.ndarray, " n"] | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Yields training batches without end, starting with batch `step`. Reshuffles each epoch.

    Each batch holds this host's b = batch_size / num_hosts examples:
        image  [b, height, width, c], of the source's dtype
        label  uint8 [b, height, width]; IGNORE_LABEL outside the example
        size   int32 [b, 2], the height and width of the example on the canvas, in pixels
        index  uint32 [b], the position of the example in the run; seeds the augmentation
        name   str [b]
    and an array [b, height, width, ...] for each of the source's fields. If the source has levels, the
    batch also holds `levels` float32 [b, 2, c].

    canvas: The height and width, in pixels, to which examples are cropped or padded. If None, a
      batch holds the examples as the source returns them, plus `index`.
    batch_size: The size of the global batch.
    workers: The number of worker processes, or 0 to use threads in this process.
    repeats: How often each example is drawn, relative to others. If None, each example is drawn once
      in an epoch.
    """
    host_batch = _host_batch(batch_size, num_hosts)
    # The host's examples. They end at the uint32 limit of positions in the run, because Grain cannot
    # count the batches of an infinite dataset.
    dataset = grain.MapDataset.range(step * host_batch, 2**32 // batch_size * host_batch)
    dataset = dataset.map(functools.partial(_position, batch_size, host_batch, host))
    weights = None if repeats is None else repeats.tobytes()
    dataset = dataset.map(functools.partial(_draw, source, canvas, seed, weights))
    return _iterate(dataset.batch(host_batch), workers)


def eval_batches(
    tiles: grain.sources.RandomAccessDataSource,
    *,
    batch_size: int,
    host: int = 0,
    num_hosts: int = 1,
    workers: int = 0,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Yields batches of tiles for this host. All hosts together get each tile exactly once.

    A tile is a dict with at least `image`, `label` and an integer `index`. All tiles have equal
    shapes. Labels become uint8. All hosts get the same number of full batches. The last batches are
    filled up with padding tiles, which have index -1 and only IGNORE_LABEL in the label. Each host
    gets a contiguous block of tiles, so that two hosts rarely decode the same image.
    """
    host_batch = _host_batch(batch_size, num_hosts)
    length = -(-len(tiles) // batch_size) * host_batch
    dataset = grain.MapDataset.range(host * length, (host + 1) * length)
    dataset = dataset.map(functools.partial(_tile, tiles))
    return _iterate(dataset.batch(host_batch), workers)


def _tile(tiles: grain.sources.RandomAccessDataSource, k: int) -> dict[str, Any]:
    """Returns tile k, or a padding tile if k >= len(tiles)."""
    tile = dict(tiles[min(k, len(tiles) - 1)])
    tile["label"] = tile["label"].astype(np.uint8)
    if k >= len(tiles):
        tile["label"] = np.full_like(tile["label"], IGNORE_LABEL)
        tile["index"] = np.full_like(tile["index"], -1)
    return tile


def join(batches: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """Concatenates batches from several streams into one batch."""
    if len(batches) == 1:
        return batches[0]
    return {field: np.concatenate([batch[field] for batch in batches]) for field in batches[0]}


def _host_batch(batch_size: int, num_hosts: int) -> int:
    if batch_size % num_hosts:
        raise ValueError(f"batch_size {batch_size} is not divisible by {num_hosts} hosts")
    return batch_size // num_hosts


def _position(batch_size: int, host_batch: int, host: int, k: int) -> int:
    """Returns the position in the run of the k-th example of a host."""
    batch, place = divmod(k, host_batch)
    return batch * batch_size + host * host_batch + place


def _draw(
    source: Examples | Sequence[dict[str, Any]],
    canvas: tuple[int, int] | None,
    seed: int,
    weights: bytes | None,
    index: int,
) -> dict[str, Any]:
    """Returns the example at position `index` of a run, after `fit` if `canvas` is not None."""
    epoch, position = divmod(index, len(source))
    example = source[int(_order(len(source), seed, epoch, weights)[position])]
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
    """Crops and pads an example to a canvas of fixed (height, width) in pixels.

    An axis longer than the canvas is cropped at a random position. A shorter axis is padded at the
    end: the image with 0, the label with IGNORE_LABEL, and each field with its `fill`. The label
    becomes uint8. Adds `size`, the int32 height and width of the example on the canvas.
    """
    window, size = [], []
    for length, room in zip(example["label"].shape, canvas, strict=True):
        start = int(rng.integers(length - room + 1)) if length > room else 0
        size.append(min(length, room))
        window.append(slice(start, start + size[-1]))
    fitted = dict(example, size=np.array(size, np.int32))
    fitted.pop("nodata", None)  # the label ignores these pixels
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


@functools.lru_cache(maxsize=32)  # several seeds may be trained at once
def _order(num_examples: int, seed: int, epoch: int, weights: bytes | None) -> np.ndarray:
    """Returns the examples of an epoch, in shuffled order.

    With w the example's share of the weights, an example is drawn floor(w n) or ceil(w n) times in
    an epoch of n draws (systematic sampling).

    weights: The bytes of a float64 array, which are hashed only once. If None, all are equal.
    """
    # Grain's shuffle takes milliseconds per example.
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(num_examples)
    if weights is None:
        return order
    ends = np.cumsum(np.frombuffer(weights)[order])
    draws = (np.arange(num_examples) + rng.random()) / num_examples * ends[-1]
    return rng.permutation(order[np.searchsorted(ends[:-1], draws, side="right")])


def _iterate(batches: grain.MapDataset, workers: int) -> grain.DatasetIterator:
    # Each worker makes whole batches, so batches do not depend on the number of workers. Grain's
    # default buffer of 500 elements could hold hundreds of GB of large images. With two
    # threads, a worker reads one example while it decodes another.
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
    """Makes a worker process ignore Ctrl-C and SIGTERM and end with the training process.

    Training needs data until it has saved a checkpoint, and these signals may reach all processes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
