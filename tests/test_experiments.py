"""Every experiment is a small difference from `base`, and builds."""

import importlib.util

import jax
import pytest

from dense_jax import train, workdir
from experiments import base, unet_ce, unet_dice
from tests.conftest import REPOSITORY

PATHS = sorted((REPOSITORY / "experiments").glob("[!_]*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_experiment_builds(path):
    config = load(path).get_config()
    train.check(config)
    run = train.assemble(config, num_classes=4, num_channels=3)
    state = jax.eval_shape(run.init)
    size = config.data.crop_size
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, *size, 3), "uint8"),
        "label": jax.ShapeDtypeStruct((config.batch_size, *size), "uint8"),
        "size": jax.ShapeDtypeStruct((config.batch_size, 2), "int32"),
        "index": jax.ShapeDtypeStruct((config.batch_size,), "uint32"),
    }
    new_state, metrics = jax.eval_shape(run.train_step, state, batch)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert metrics["train/loss"].shape == ()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_experiment_has_the_fields_of_base(path):
    fields = workdir.flatten(load(path).get_config().to_dict())
    assert fields.keys() == workdir.flatten(base.get_config().to_dict()).keys()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_experiment_tells_its_command(path):
    if path.stem != "base":
        assert f"--config=experiments/{path.name}" in load(path).__doc__


def test_dice_and_cross_entropy_differ_in_the_loss_alone():
    ce = workdir.flatten(unet_ce.get_config().to_dict())
    dice = workdir.flatten(unet_dice.get_config().to_dict())
    assert {field for field in ce if ce[field] != dice[field]} == {"loss"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("loss", "dise", "loss='dise' is not one of cross_entropy, soft_dice"),
        ("data.name", "imagenet", "data.name='imagenet' is not one of folder, synthetic"),
        ("data.cache", "disk", "data.cache='disk' is not one of none, host"),
        ("optimizer.name", "lion", "optimizer.name='lion' is not one of adamw, sgd"),
        ("optimizer.schedule", "step", "optimizer.schedule='step' is not one of constant"),
        ("loss_options.smooth", 1.0, "loss_options.smooth is no option of loss='cross_entropy'"),
        ("num_steps", 0, "num_steps=0 must be positive"),
        ("eval_every", -1, "eval_every=-1 must be positive"),
        ("data.resolution", 0.0, "data.resolution=0.0 must be positive"),
        ("data.crop_size", (64,), r"data.crop_size=\(64,\) must be a height and a width"),
        ("batch_size", 6, "batch_size=6 .* multiple of the number of devices, 4"),
    ],
)
def test_a_bad_value_is_named_with_the_valid_ones(field, value, message):
    config = base.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        train.check(config)
