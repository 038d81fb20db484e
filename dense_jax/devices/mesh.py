"""Where arrays live: a mesh of replicas, each a whole training on its share of the devices.

The only file that names a mesh axis. Within a replica, training is data-parallel: parameters are
replicated, batches split, and the optimizer's state is either. A single training is one replica.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(num_replicas: int = 1) -> Mesh:
    """All devices, host by host. Auto axes: XLA propagates shardings from the inputs."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(
        np.reshape(devices, (num_replicas, -1)),
        ("replica", "data"),
        axis_types=(AxisType.Auto,) * 2,
    )


def check_shares(num_seeds: int, batch_size: int, num_microbatches: int) -> None:
    """Raises ValueError if the devices cannot share seeds and batch evenly."""
    num_devices, num_hosts = jax.device_count(), jax.process_count()
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
    """The same array on every device."""
    return NamedSharding(mesh, P())


def sharded(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices: the batches of all replicas, one after the other."""
    return NamedSharding(mesh, P(("replica", "data")))


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


def share(mesh: Mesh) -> tuple[list[int], int, int]:
    """This host's replicas, its place among the hosts of each, and how many hosts those are."""
    hosts = [sorted({device.process_index for device in row}) for row in mesh.devices]
    mine = [k for k, each in enumerate(hosts) if jax.process_index() in each]
    return mine, hosts[mine[0]].index(jax.process_index()), len(hosts[mine[0]])


def sharded_shapes(shapes: Any, mesh: Mesh) -> Any:
    """The batches of all replicas, in one, of one replica's jax.ShapeDtypeStructs."""

    def of(x):
        shape = x.shape[0] * mesh.shape["replica"], *x.shape[1:]
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharded(mesh))

    return jax.tree.map(of, shapes)


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's slice of the global batch -> one global array per numeric field."""
    return {
        field: jax.make_array_from_process_local_data(sharded(mesh), array)
        for field, array in batch.items()
        if array.dtype.kind != "U"  # names stay on the host
    }


def side_by_side(step: Callable, mesh: Mesh) -> Callable:
    """step(state, batch, key, shared) -> the same of all replicas at once, none knowing of others.

    State, key and results are those of `stack`, the batch is that of `to_global`, and what is
    shared is the same for all.
    """
    if mesh.shape["replica"] == 1:
        return step

    def of_one(state, batch, key, shared):
        state, key = jax.tree.map(lambda x: x[0], (state, key))
        results = step(state, batch, key, shared)
        return jax.tree.map(lambda x: x[None], results)

    return jax.shard_map(
        of_one,
        mesh=mesh,
        in_specs=(P("replica"), P("replica"), P("replica"), P()),
        out_specs=P("replica"),
        axis_names={"replica"},  # within a replica, XLA goes on as ever
        check_vma=False,
    )


def stacked(shardings: Any, mesh: Mesh) -> Any:
    """Where `stack` puts arrays that are in these shardings over all devices."""
    if mesh.shape["replica"] == 1:
        return shardings
    return jax.tree.map(lambda each: NamedSharding(mesh, P("replica", *each.spec)), shardings)


def stacked_shapes(shapes: Any, mesh: Mesh) -> Any:
    """What `stack` makes of placed jax.ShapeDtypeStructs."""
    num_replicas = mesh.shape["replica"]
    if num_replicas == 1:
        return shapes

    def of(x):
        sharding = stacked(x.sharding, mesh)
        return jax.ShapeDtypeStruct((num_replicas, *x.shape), x.dtype, sharding=sharding)

    return jax.tree.map(of, shapes)


def stack(states: Sequence[Any], shardings: Any, mesh: Mesh) -> Any:
    """One state of each replica, over all devices in these shardings -> each on its own devices.

    A leading axis counts the replicas, unless there is one only.
    """
    if mesh.shape["replica"] == 1:
        return states[0]

    def together(*states):
        return jax.tree.map(lambda *xs: jnp.stack(xs), *states)

    return jax.jit(together, out_shardings=stacked(shardings, mesh))(*states)


def unstacker(shardings: Any, mesh: Mesh) -> Callable[[Any, int], Any]:
    """Returns the inverse of `stack`, (states, k) -> the state of replica k, compiled once."""
    if mesh.shape["replica"] == 1:
        return lambda states, k: states
    take = jax.jit(lambda states, k: jax.tree.map(lambda x: x[k], states), out_shardings=shardings)
    return lambda states, k: take(states, np.int32(k))
