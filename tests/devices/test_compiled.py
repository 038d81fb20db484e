"""Tests the compiled steps of `train`: collectives, donation and the number of compilations."""

import math
import re

import jax
import numpy as np
import pytest

from dense_jax import train
from dense_jax.devices import mesh
from dense_jax.program import assemble, jit_eval_step
from dense_jax.training import task
from dense_jax.workdir import logger
from experiments import base

BATCH = 8  # two images a device
CANVAS = (16, 16)
COLLECTIVES = (
    *("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute"),
    *("ragged-all-to-all", "reduce-scatter"),
)
ITEM_BYTES = {"pred": 1, "u8": 1, "s32": 4, "u32": 4, "f32": 4}


def make_config(**model):
    config = base.get_config()
    config.batch_size = BATCH
    config.model.widths = (2, 3)
    config.model.update(model)
    config.data.crop_size = (8, 8)
    return config


def shapes_of(config):
    """Returns the program, its training, and the shapes of a state and of a batch."""
    program = assemble(config, num_classes=3)
    training = task.bind(config, program, num_channels=3)
    return program, training, training.shapes(), task.batch_shapes(config, CANVAS, num_channels=3)


def compile_train_step(config, *, resident=False):
    """Returns the compiled step, and the shapes of its state."""
    _, training, state, batch = shapes_of(config)
    arrays = {}
    if resident:
        arrays = {
            field: jax.ShapeDtypeStruct((20, *x.shape[1:]), x.dtype)
            for field, x in batch.items()
            if field != "index"
        }
        batch = {"index": batch["index"], "row": jax.ShapeDtypeStruct((BATCH,), "int32")}
    placed = task.place(config, training, batch)
    return placed.train_step.lower(*placed.arguments, arrays).compile(), state


def collectives(compiled):
    """Each with the sizes of the arrays it moves, in bytes: [(name, [bytes, ...]), ...]."""
    found = []
    kinds = "|".join(COLLECTIVES)
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text()):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        found.append(
            (
                kind,
                [
                    ITEM_BYTES[t] * math.prod(map(int, filter(None, n.split(","))))
                    for t, n in arrays
                ],
            )
        )
    return found


def num_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def group_norm():
    return compile_train_step(make_config(norm="group"))


@pytest.fixture(scope="module")
def batch_norm():
    return compile_train_step(make_config(norm="batch"))


@pytest.fixture(scope="module")
def resident():
    return compile_train_step(make_config(norm="group"), resident=True)


def test_gradients_are_one_all_reduce_and_nothing_else_but_the_loss(group_norm):
    """Each parameter once, in float32; the loss needs the number of valid pixels before them."""
    compiled, state = group_norm
    (first, scalars), (second, gradients) = collectives(compiled)
    assert first == second == "all-reduce"
    assert sum(scalars) <= 8
    assert num_bytes(state.params) <= sum(gradients) <= num_bytes(state.params) + 8


def test_images_in_device_memory_never_move_between_devices(group_norm, resident):
    """Each device gathers its rows from its own copy."""
    assert collectives(resident[0]) == collectives(group_norm[0])


def test_batch_norm_adds_three_small_all_reduces_per_layer(batch_norm, group_norm):
    """Of the global batch: a channel's mean of the corners, and with its help mean and mean square
    forwards; their gradients backwards.

    Those of the last pass may travel with gradients of other layers.
    """
    compiled, state = batch_norm
    found = collectives(compiled)
    assert {kind for kind, _ in found} == {"all-reduce"}
    num_norms = len(jax.tree.leaves(state.batch_stats)) // 2
    assert 2 * num_norms <= len(found) - len(collectives(group_norm[0])) <= 3 * num_norms
    moved = sum(sum(sizes) for _, sizes in found)
    small = 5 * num_bytes(state.batch_stats) // 2 + 8
    assert num_bytes(state.params) < moved <= num_bytes(state.params) + small


def test_a_step_on_a_cpu_has_every_product_once_and_in_its_fast_form(batch_norm):
    """Six 3x3 convolutions with two gradients each, but of the image; the 1x1 as matrix products."""
    text = batch_norm[0].as_text()
    found = re.findall(r"= \w+\[([\d,]+)\]\S* convolution\(.*window=\{(.*?)\}", text)
    of_kernels = [window for shape, window in found if shape.count(",") == 2]  # over rows
    assert len(found) == 6 + 5 + 6 and len(of_kernels) == 6
    assert not any("dilate" in window for _, window in found)
    assert len(re.findall(r"= \S+ dot\(", text)) == 2 * 3


def test_seeds_side_by_side_share_nothing_but_their_metrics(group_norm):
    """Gradients are summed over each seed's own devices."""
    config = make_config(norm="group")
    config.num_seeds = 2
    compiled, state = compile_train_step(config)
    found = collectives(compiled)
    sums = [sizes for kind, sizes in found if kind == "all-reduce"]
    assert sum(map(sum, sums)) <= num_bytes(state.params) + 16
    pairs = re.findall(
        r"all-reduce\(.*replica_groups=(\{\{0,1\},\{2,3\}\}|\[2,2\]<=\[4\])", compiled.as_text()
    )
    assert len(pairs) == len(sums) == len(collectives(group_norm[0]))
    others = [(kind, sizes) for kind, sizes in found if kind != "all-reduce"]
    assert others == [("all-gather", [2 * 4])] * 3  # the metrics of both
    assert compiled.memory_analysis().alias_size_in_bytes == num_bytes(state)


@pytest.mark.parametrize("step", ["group_norm", "batch_norm", "resident"])
def test_the_state_is_donated(step, request):
    """All of it: a step needs memory for one state, not for two."""
    compiled, state = request.getfixturevalue(step)
    assert compiled.memory_analysis().alias_size_in_bytes == num_bytes(state)


def test_evaluation_gathers_its_results_alone():
    """Class maps and labels, confusion matrices and tile numbers: no image, no logits."""
    program, _, state, _ = shapes_of(make_config())
    batch = {
        "image": jax.ShapeDtypeStruct((BATCH, *CANVAS, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((BATCH, *CANVAS), np.uint8),
        "index": jax.ShapeDtypeStruct((BATCH,), np.int32),
    }
    step = jit_eval_step(program, mesh.make_mesh())
    found = collectives(step.lower(state.variables(), batch).compile())
    assert {kind for kind, _ in found} == {"all-gather"}
    sizes = sorted(size for _, each in found for size in each)
    maps = 2 * [BATCH * math.prod(CANVAS)]
    assert sizes == sorted([4 * BATCH, 4 * BATCH * 3 * 3, *maps])


def test_nothing_is_compiled_after_the_first_step_and_the_first_evaluation(
    tiny_folder, tmp_path, monkeypatch
):
    config = make_config()
    config.num_steps, config.eval_every, config.checkpoint_every, config.log_every = 9, 3, 2, 1
    config.data.name, config.data.root = "folder", str(tiny_folder)
    compiled, after = [], {}

    def listen(event, _, **about):
        if "backend_compile" in event:
            compiled.append(event)

    scalars = logger.Logger.scalars

    def count(self, step, values):
        after[step] = len(compiled)
        scalars(self, step, values)

    monkeypatch.setattr(logger.Logger, "scalars", count)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train.train(config, str(tmp_path))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert after[1] > 0
    assert after[3] == after[9], after
