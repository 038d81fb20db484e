"""A whole training set in device memory: the step gathers a batch by the numbers of its rows.

The host sends row numbers and nothing else: no image is decoded or copied after `load`.
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
    """Decodes a source into the memory of every device: (arrays [n, ...], rows).

    batch_shapes: the shapes of the batches to be gathered, by field.
    rows: examples for the batches, with `row`, the example's number, and `name` instead of images.

    Raises ValueError if an image is larger than the canvas, the memory is not there, or examples
    are bad.
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
        if field != "index"  # the example's number in the run
    }
    needed = sum(shape.size * shape.dtype.itemsize for shape in shapes.values())
    what = f"{n} examples of {height} x {width} pixels"
    cache.check_memory(needed, cache.free_memory(), what)
    for device in mesh.local_devices:
        cache.check_memory(needed, free_memory(device), f"{what} on {device}")

    arrays = {field: np.empty(shape.shape, shape.dtype) for field, shape in shapes.items()}

    def place(i: int) -> dict[str, Any]:
        rng = np.random.default_rng()  # draws nothing
        fitted = pipeline.fit(source[i], canvas, rng, source.fields)
        for field, array in arrays.items():
            array[i] = fitted[field]
        return {"row": np.int32(i), "name": fitted["name"]}

    rows, errors = verify.visit(place, n, "decoding")
    verify.refuse(errors, n)
    sharding = meshes.replicated(mesh)
    # Each host gives its own copy; `device_put` would compare them all.
    return {
        field: jax.make_array_from_callback(array.shape, sharding, lambda _, array=array: array)
        for field, array in arrays.items()
    }, rows


def gather(arrays: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Adds the examples of a batch's rows to it; without arrays, returns the batch itself."""
    return {**batch, **{field: array[batch["row"]] for field, array in arrays.items()}}


def free_memory(device: jax.Device) -> float:
    """Returns the free bytes of a device's memory; infinite where the device does not tell."""
    stats = device.memory_stats()
    return float(stats["bytes_limit"] - stats["bytes_in_use"]) if stats else math.inf
