"""Trains several seeds in one program, each on its replica (an equal part of the devices).

The states of all seeds are stacked along a leading axis, which is split over the replicas. With a
single seed, nothing is stacked.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dense_jax.devices.mesh import sharded


def side_by_side(step: Callable, mesh: Mesh) -> Callable:
    """Returns a function that runs step(state, batch, key, shared) on all replicas at once.

    The function takes the stacked states and keys (see `stack`), the concatenated batches, and
    `shared`, which every replica gets unchanged. It returns stacked results. Replicas do not
    communicate.
    """
    if mesh.shape["replica"] == 1:
        return step

    def step_of_replica(state, batch, key, shared):
        state, key = jax.tree.map(lambda x: x[0], (state, key))
        results = step(state, batch, key, shared)
        return jax.tree.map(lambda x: x[None], results)

    return jax.shard_map(
        step_of_replica,
        mesh=mesh,
        in_specs=(P("replica"), P("replica"), P("replica"), P()),
        out_specs=P("replica"),
        axis_names={"replica"},  # within a replica, XLA propagates shardings as usual
        check_vma=False,
    )


def stack(states: Sequence[Any], shardings: Any, mesh: Mesh) -> Any:
    """Stacks the states of all replicas, and moves each state to the devices of its replica."""
    if mesh.shape["replica"] == 1:
        return states[0]

    def stacked(*states):
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)

    return jax.jit(stacked, out_shardings=stacked_shardings(shardings, mesh))(*states)


def unstacker(shardings: Any, mesh: Mesh) -> Callable[[Any, int], Any]:
    """Returns a compiled function (stacked states, k) -> the state of replica k; see `stack`."""
    if mesh.shape["replica"] == 1:
        return lambda states, k: states
    take = jax.jit(lambda states, k: jax.tree.map(lambda x: x[k], states), out_shardings=shardings)
    return lambda states, k: take(states, np.int32(k))


def stacked_shardings(shardings: Any, mesh: Mesh) -> Any:
    """Returns the shardings of stacked arrays, given the shardings of one seed's arrays."""
    if mesh.shape["replica"] == 1:
        return shardings
    return jax.tree.map(
        lambda sharding: NamedSharding(mesh, P("replica", *sharding.spec)), shardings
    )


def stacked_shapes(shapes: Any, mesh: Mesh) -> Any:
    """Returns the shapes and shardings of the arrays that `stack` returns.

    shapes: The shapes and shardings of one seed's arrays.
    """
    num_replicas = mesh.shape["replica"]
    if num_replicas == 1:
        return shapes

    def stacked(x):
        sharding = stacked_shardings(x.sharding, mesh)
        return jax.ShapeDtypeStruct((num_replicas, *x.shape), x.dtype, sharding=sharding)

    return jax.tree.map(stacked, shapes)


def batch_shapes(shapes: Any, mesh: Mesh) -> Any:
    """Returns the shapes and shardings of the concatenated batches of all replicas.

    shapes: The shapes of one seed's batch.
    """

    def joined(x):
        shape = x.shape[0] * mesh.shape["replica"], *x.shape[1:]
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharded(mesh))

    return jax.tree.map(joined, shapes)
