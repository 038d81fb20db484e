"""Tests which axis of an array is sharded. test_steps and test_train test the consequences."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dense_jax.devices import mesh
from tests.conftest import mesh_of


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


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((3, 8, 1), "num_seeds=3 cannot share 4 devices of 1 hosts evenly"),
        ((1, 6, 1), "batch_size=6 .* multiple of the number of devices, 4, times"),
        ((1, 8, 4), "batch_size=8 .* devices, 4, times num_microbatches=4"),
        ((2, 3, 1), "batch_size=3 .* number of devices, 2, for each of num_seeds=2, times"),
    ],
)
def test_the_devices_must_share_seeds_and_batch_evenly(numbers, message):
    mesh.check_shares(2, 8, 2)
    with pytest.raises(ValueError, match=message):
        mesh.check_shares(*numbers)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_batches_are_as_few_as_the_largest_allow_and_even(num_devices):
    devices = mesh_of(num_devices)
    for num_examples, most in itertools.product(range(1, 40), (1, 3, 8)):
        size = mesh.even_batch_size(num_examples, most, devices)
        largest = math.ceil(most / num_devices) * num_devices
        assert size % num_devices == 0 and size <= largest
        num_batches = math.ceil(num_examples / size)
        assert num_batches == math.ceil(num_examples / largest)
        assert num_batches * size - num_examples < num_batches * num_devices
