"""Keeps a whole training set in device memory, from which the training step gathers each batch.

The host sends only the indices of the examples. No image is decoded or copied after `load`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dense_jax.data import Examples, cache, pipeline, verify
from dense_jax.devices import mesh as meshes


def load(
    source: Examples, batch_shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> tuple[dict[str, jax.Array], list[dict[str, Any]]]:
    """Copies all n decoded examples of a source to every device. Returns (arrays, rows).

    `arrays` holds the examples as {field: [n, ...]}. `rows` holds {"row": index, "name": name} for
    each example. Batches are drawn from `rows` instead of `source`.

    batch_shapes: The shapes of a training batch, by field.

    Raises ValueError if an image is larger than the canvas or unreadable, or if the host or a
    device does not have enough memory.
    """
    n = len(source)
    _, height, width = batch_shapes["label"].shape
    canvas = height, width
    if cut := np.count_nonzero((source.sizes > canvas).any(axis=1)):
        largest = tuple(source.sizes.max(axis=0).tolist())
        raise ValueError(
            f"data.cache='device' keeps whole images, but {cut} of {n} are larger than "
            f"data.canvas_size={canvas}: make it {largest}, or set data.cache='host'"
        )
    shapes = {
        field: jax.ShapeDtypeStruct((n, *of_batch.shape[1:]), of_batch.dtype)
        for field, of_batch in batch_shapes.items()
        if field != "index"  # the example's running number, which is added to each batch
    }
    needed = sum(shape.size * shape.dtype.itemsize for shape in shapes.values())
    what = f"{n} examples of {height} x {width} pixels"
    cache.check_memory(needed, cache.free_memory(), what)
    for device in mesh.local_devices:
        cache.check_memory(needed, free_memory(device), f"{what} on {device}")

    arrays = {field: np.empty(shape.shape, shape.dtype) for field, shape in shapes.items()}

    def place(i: int) -> dict[str, Any]:
        rng = np.random.default_rng()  # unused, because no image exceeds the canvas
        fitted = pipeline.fit(source[i], canvas, rng, source.fields)
        for field, array in arrays.items():
            array[i] = fitted[field]
        return {"row": np.int32(i), "name": fitted["name"]}

    rows, errors = verify.visit(place, n, "reading and keeping")
    verify.refuse(errors, n)
    sharding = meshes.replicated(mesh)
    # Each host supplies its own copy. `device_put` would compare the copies of all hosts.
    return {
        field: jax.make_array_from_callback(array.shape, sharding, lambda _, array=array: array)
        for field, array in arrays.items()
    }, rows


def gather(arrays: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns `batch` with a new field for each array in `arrays`: its rows batch["row"]."""
    return {**batch, **{field: array[batch["row"]] for field, array in arrays.items()}}


def free_memory(device: jax.Device) -> float:
    """Returns a device's free memory in bytes, or infinity if unknown."""
    stats = device.memory_stats()
    return float(stats["bytes_limit"] - stats["bytes_in_use"]) if stats else math.inf
