"""Where arrays live: one data-parallel axis over all devices of all hosts.

The only file that names a mesh axis. Parameters are replicated, batches split.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh() -> Mesh:
    """All devices in a row. Auto axes: XLA propagates shardings from the inputs."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def sharded(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, P("data"))


def map_examples(function: Callable, mesh: Mesh) -> Callable:
    """function(variables, example) -> the same over a batch, split over the devices.

    Each device takes its examples one after the other, by the same program whatever the batch:
    in a batched convolution the order of a sum, and so the last bit of a logit and now and then a
    predicted class, depends on the batch size.
    """

    def over_batch(variables, batch):
        return jax.lax.map(lambda example: function(variables, example), batch)

    return jax.shard_map(
        over_batch, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False
    )


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's slice of the global batch -> one global array per numeric field."""
    return {
        field: jax.make_array_from_process_local_data(sharded(mesh), array)
        for field, array in batch.items()
        if array.dtype.kind != "U"  # names stay on the host
    }
