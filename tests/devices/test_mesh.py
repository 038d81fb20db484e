"""Which axis of an array is split; test_steps and test_train tell what comes of it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dense_jax.devices import mesh


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 8, 16), P(None, None, None, "data")),
        ((3, 3, 16, 8), P(None, None, "data")),
        ((4, 4, 6, 5), P("data")),
        ((3, 3, 2, 5), P()),  # nothing divides
        ((16,), P()),  # small
        ((), P()),
    ],
)
def test_the_largest_axis_that_the_devices_divide_is_split(shape, spec):
    shapes = {"moment": jax.ShapeDtypeStruct(shape, jnp.float32)}
    assert mesh.spread(shapes, mesh.make_mesh())["moment"].spec == spec
