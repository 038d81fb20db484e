"""Where arrays live: one data-parallel axis over all devices of all hosts.

The only file that names a mesh axis. Parameters are replicated, batches split, and the optimizer's
state is either.
"""

from collections.abc import Callable, Mapping
from typing import Any

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


def spread(shapes: Any, mesh: Mesh) -> Any:
    """The shardings that split each array of a tree over the devices; made for optimizer states.

    Along the largest axis that the number of devices divides; without one it is replicated. So are
    arrays of one axis: they are small, and through their gradients the compiler would split the
    norms in the network as well, with a gather in each.

    With replicated parameters that is stage 1 of ZeRO (Rajbhandari et al. 2020, section 5.1). The
    compiler sums the gradient over the devices (all-reduce), lets each device update its slice of
    moments, parameters and averages, and gathers the latter two (all-gather); where it knows
    reduce-scatter, that may be the sum and the slice. Norms of the gradient become sums over
    slices, so that last bits differ.
    """

    def of(x):
        axes = [axis for axis, length in enumerate(x.shape) if length % mesh.size == 0]
        if x.ndim < 2 or not axes:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, P(*[None] * largest, "data"))

    return jax.tree.map(of, shapes)


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
