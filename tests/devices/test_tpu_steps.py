"""Tests the steps as the TPU's compiler sees them, if it is installed.

libtpu compiles for TPUs on any machine: `pip install "jax[tpu]"`.
"""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest

from dense_jax import summary
from dense_jax.devices import cost, mesh, tpu_compiler
from dense_jax.program import assemble
from dense_jax.training import task
from experiments import base

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install "jax[tpu]"'
)


def small(**fields):
    """A config of a small U-Net whose steps compile fast."""
    config = base.get_config()
    config.batch_size = 16
    config.model.widths = (8, 16)
    with config.ignore_type():
        config.update_from_flattened_dict(fields)
    return config


def compiled_step(config, topology="v5e-4", num_slices=1):
    """The compiled training step, and its jitted function with the shapes of the arguments."""
    devices, _ = tpu_compiler.describe(topology, num_slices)
    training = task.bind(config, assemble(config, 3), 3)
    batch = task.batch_shapes(config, config.data.crop_size, 3)
    placed = task.place(config, training, batch, devices)
    return placed.train_step.lower(*placed.arguments, {}).compile(), training


VARIANTS = {
    "64 channels": {"model.widths": (64, 128), "model.dtype": "bfloat16"},
    "U-Net, bfloat16": {"model.dtype": "bfloat16"},
    "U-Net, float32": {},
    "FCN": {"model.name": "fcn", "model.upsampling": "bilinear"},
    "two seeds": {"num_seeds": 2},
    "sharded optimizer": {"optimizer.sharded": True},
    "microbatches": {"num_microbatches": 2},
}

# The estimated cycles, and the bytes of temporaries, by libtpu 0.0.42.1 and jax 0.10.2
COSTS = {
    "64 channels": (2_570_003, 8_160_768),
    "U-Net, bfloat16": (1_318_430, 0),
    "two seeds": (1_309_144, 7_257_600),
}


@needs_compiler
@pytest.mark.parametrize("name", VARIANTS)
def test_steps_for_tpus_reduce_each_gradient_once_and_reuse_the_state(name):
    config = small(**VARIANTS[name])
    compiled, training = compiled_step(config)
    params = training.shapes().params
    # Gradients of a convolution have its type.
    itemsize = jnp.dtype(config.model.dtype).itemsize
    size = itemsize * sum(x.size for x in jax.tree.leaves(params))
    found = tpu_compiler.collectives(compiled)
    # Kernels of joined pixels are up to four times as large, and batch norms have small sums.
    assert 0.99 * size < found["all-reduce"][1] < 4.2 * size
    moved = set()
    if config.optimizer.sharded:
        moved = {"all-gather", "all-to-all", "collective-permute"}
    assert set(found) == {"all-reduce"} | moved
    assert all(found[kind][1] <= 4 * size for kind in moved)
    text = compiled.as_text()
    assert not re.search(r" (infeed|outfeed|send|recv)\(", text)
    memory = cost.memory(compiled)
    assert memory["aliased"] > 0.9 * memory["outputs"]  # the old state's memory holds the new one
    cycles = sum(i.cycles for i in tpu_compiler.instructions(compiled))
    cycles_then, temporaries_then = COSTS.get(name, (math.inf, math.inf))
    assert cycles <= 1.1 * cycles_then
    assert memory["temporaries"] <= 1.1 * temporaries_then


@needs_compiler
def test_the_devices_of_a_slice_adjoin_and_steps_compile_for_two_slices():
    devices, _ = tpu_compiler.describe("v5e-4", 2)
    placed = mesh.make_mesh(devices=devices[::-1]).devices.flat
    assert [device.slice_index for device in placed] == [0] * 4 + [1] * 4
    compiled, _ = compiled_step(small(), num_slices=2)
    assert tpu_compiler.collectives(compiled)["all-reduce"][0] > 0


@needs_compiler
def test_the_summary_agrees_with_the_compiler():
    config = small()
    about, table, layers = summary.tpu_tables(config, 3, 3, "v5e-4")
    assert about.startswith("For 4 devices (TPU v5 lite, 1 x v5e-4)")
    compiled, _ = compiled_step(config)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert f"| {temporaries / 1e6:,.1f} MB |" in re.sub(" +", " ", table)
    assert "| decoder/stride1/conv" in layers
