"""The memory of a training step, from its shapes alone."""

import subprocess
import sys

import jax
import pytest

from dense_jax import memory
from dense_jax.program import assemble, batch_shapes
from experiments import base
from tests.conftest import REPOSITORY


def make_config(**fields):
    config = base.get_config()
    config.batch_size = 8
    config.model.widths = (2, 3)
    config.model.norm = "group"
    config.data.crop_size = (8, 8)
    config.data.canvas_size = (16, 12)
    config.update(fields)
    return config


def num_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def needed():
    return memory.analyze(make_config(), num_classes=3, num_channels=1)


def test_arguments_are_the_state_and_the_devices_part_of_the_batch(needed):
    config = make_config()
    state = assemble(config, num_classes=3, num_channels=1).shapes()
    batch = batch_shapes(config, (16, 12), num_channels=1)
    assert needed["aliased"] == num_bytes(state)
    key = 8
    assert needed["arguments"] == num_bytes(state) + num_bytes(batch) // jax.device_count() + key


def test_the_peak_counts_donated_memory_once(needed):
    gained = needed["outputs"] - needed["aliased"]  # the metrics, and pointers to all outputs
    assert 0 < gained < 2000
    assert needed["peak"] == needed["arguments"] + needed["temporaries"] + gained


def test_twice_the_batch_needs_more_memory_and_twice_the_work(needed):
    larger = memory.analyze(make_config(batch_size=16), num_classes=3, num_channels=1)
    assert larger["aliased"] == needed["aliased"]
    assert larger["temporaries"] > 1.5 * needed["temporaries"]
    assert larger["flops"] == pytest.approx(2 * needed["flops"], rel=0.1)


def test_nothing_is_allocated():
    before = len(jax.live_arrays())
    memory.analyze(make_config(), num_classes=3, num_channels=1)
    assert len(jax.live_arrays()) == before


def test_the_command_says_whose_figures_they_are():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dense_jax.memory", "--config=experiments/unet_dice.py"),
            *("--config.model.widths=(2,3)", "--config.data.crop_size=(8,8)", "--num_classes=3"),
        ],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "8 images on each of 1 cpu, by XLA:CPU's analysis: a GPU's or TPU's" in done.stdout
    assert "| peak | " in done.stdout
