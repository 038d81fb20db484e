"""The device mesh and the sharding of arrays over it.

The "replica" axis enumerates the seeds that train in parallel, each on the same number of devices.
The "data" axis enumerates the devices of a replica. Within a replica, training is data-parallel:
parameters are replicated, batches are split, and the optimizer state is either replicated or split.
Training a single seed uses one replica.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(num_replicas: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with axes "replica" and "data". The devices of a slice and of a host adjoin.

    devices: The devices of the mesh; by default, all devices.
    """

    def place(device: jax.Device) -> tuple[int, int, int]:
        return getattr(device, "slice_index", None) or 0, device.process_index, device.id

    devices = sorted(jax.devices() if devices is None else devices, key=place)
    return Mesh(
        np.reshape(devices, (num_replicas, -1)),
        ("replica", "data"),
        axis_types=(AxisType.Auto,) * 2,
    )


def check_shares(
    num_seeds: int,
    batch_size: int,
    num_microbatches: int,
    devices: Sequence[jax.Device] | None = None,
) -> None:
    """Raises ValueError if the seeds and the batch cannot be split evenly over the devices.

    devices: The devices to split over; by default, all devices.
    """
    devices = jax.devices() if devices is None else devices
    hosts = [device.process_index for device in devices]
    num_devices, num_hosts = len(hosts), len(set(hosts))
    if num_devices % num_seeds or (num_seeds % num_hosts and num_hosts % num_seeds):
        raise ValueError(
            f"num_seeds={num_seeds} cannot share {num_devices} devices of {num_hosts} hosts evenly: "
            "it must divide the devices, and divide the hosts or be a multiple of them"
        )
    share = num_devices // num_seeds
    if batch_size % (num_microbatches * share):
        seeds = f", for each of num_seeds={num_seeds}" if num_seeds > 1 else ""
        raise ValueError(
            f"batch_size={batch_size} is the global batch and must be a multiple of the number of "
            f"devices, {share}{seeds}, times num_microbatches={num_microbatches}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is replicated on all devices."""
    return NamedSharding(mesh, P())


def sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis of a batch over all devices.

    The leading axis concatenates the batches of all replicas.
    """
    return NamedSharding(mesh, P(("replica", "data")))


def spread(shapes: Any, mesh: Mesh) -> Any:
    """Returns shardings that split the arrays of an optimizer state over the devices.

    Splits each array along its longest axis whose length is divisible by the number of devices.
    Replicates arrays that have no such axis or fewer than two axes.

    With replicated parameters, this sharding is stage 1 of ZeRO (Rajbhandari et al. 2020, section
    5.1). Each device updates its slices of the optimizer state and of the parameters. An all-gather
    then collects the parameters. Summing gradient norms over slices changes their last bits.
    """

    # Splitting scales and biases would make XLA insert an all-gather into each normalization layer.
    def split(x):
        axes = [axis for axis, length in enumerate(x.shape) if length % mesh.size == 0]
        if x.ndim < 2 or not axes:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, P(*[None] * largest, "data"))

    return jax.tree.map(split, shapes)


def map_examples(function: Callable, mesh: Mesh) -> Callable:
    """Returns f(variables, batch), which applies function(variables, example) to each example.

    The batch is split over the devices. Each device processes one example at a time, so that
    results do not depend on the batch size. A batched convolution may sum in a different order,
    which changes the last bit of a logit and occasionally a predicted class.
    """

    def over_batch(variables, batch):
        return jax.lax.map(lambda example: function(variables, example), batch)

    return jax.shard_map(
        over_batch, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False
    )


def even_batch_size(num_examples: int, most: int, mesh: Mesh) -> int:
    """Returns the size of the batches that hold `num_examples` with the least padding.

    There are as few batches as if each held `most` examples, rounded up to a multiple of the number
    of devices. Their size is such a multiple, too.
    """

    def rounded(number: int) -> int:
        return -(-number // mesh.size) * mesh.size

    num_batches = -(-num_examples // rounded(most))
    return rounded(-(-num_examples // num_batches))


def share(mesh: Mesh) -> tuple[list[int], int, int]:
    """Returns this host's part of the mesh, as (replicas, index, num_hosts).

    replicas: The replicas that have devices on this host.
    index: The index of this host among the hosts of a replica.
    num_hosts: The number of hosts per replica.
    """
    hosts = [sorted({device.process_index for device in row}) for row in mesh.devices]
    replicas = [k for k, indices in enumerate(hosts) if jax.process_index() in indices]
    first = hosts[replicas[0]]
    return replicas, first.index(jax.process_index()), len(first)


def placed(shapes: Any, shardings: Any) -> Any:
    """Returns `shapes` with shardings attached. `shardings` is a pytree prefix of `shapes`."""

    def place(sharding, part):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    return jax.tree.map(place, shardings, shapes)


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the global batch, given this host's slice of it. Drops string entries."""
    return {
        field: jax.make_array_from_process_local_data(sharded(mesh), array)
        for field, array in batch.items()
        if array.dtype.kind != "U"  # strings stay on the host
    }
