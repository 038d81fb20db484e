"""Every experiment is a small difference from `base`, and builds."""

import importlib.util
import inspect
import math
import re

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from dense_jax import losses, models, sweep, train
from dense_jax.program import assemble, batch_shapes
from dense_jax.workdir import files as workdir
from experiments import base, unet_ce, unet_dice
from tests.conftest import REPOSITORY


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PATHS = sorted((REPOSITORY / "experiments").glob("[!_]*.py"))
SIZES = {"camvid_unet": "reduced", "camvid_segnet_table": "reduced", "ablation_grid": "full"}
# Some sweeps have the config of another file.
CONFIGS = [(path, ()) for path in PATHS if load(path).get_config.__module__ == path.stem] + [
    (REPOSITORY / "experiments" / f"{name}.py", (size,)) for name, size in SIZES.items()
]


@pytest.mark.parametrize(
    ("path", "arguments"), CONFIGS, ids=lambda value: getattr(value, "stem", "")
)
def test_every_experiment_builds(path, arguments):
    config = load(path).get_config(*arguments)
    config.data.root = "anywhere"
    config.batch_size = max(config.batch_size, jax.device_count())  # one per device
    train.check(config)
    run = assemble(config, num_classes=4, num_channels=3)
    state = run.shapes()
    batch = batch_shapes(config, config.data.crop_size, num_channels=3)
    new_state, metrics = jax.eval_shape(run.train_step, state, batch, jax.random.key(0))
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert metrics["train/loss"].shape == ()


def sweeps():
    """Every experiment with a sweep, and its number of runs."""
    return {path: load(path).get_sweep() for path in PATHS if hasattr(load(path), "get_sweep")}


def test_the_sweeps_have_as_many_runs_as_they_say():
    for path, runs in sweeps().items():
        (number,) = re.findall(r"(\d+) runs|$", load(path).__doc__)[:1]
        assert number in ("", str(len(runs))), path
        assert max(map(len, sweep.run_names(runs))) < 80


def parameters(config) -> int:
    """Of the model for RGB and 11 classes, which is traced."""
    model = models.build(config.model, num_classes=11)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    logits, variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=True), image
    )
    assert logits.shape == (1, 32, 32, 11)
    return sum(x.size for x in jax.tree.leaves(variables["params"]))


def changed(config, override):
    with config.ignore_type():
        config.update_from_flattened_dict(override)
    return config


@pytest.mark.parametrize("path", list(sweeps()), ids=lambda path: path.stem)
def test_every_run_of_a_sweep_builds(path):
    built = set()
    for override in sweeps()[path]:
        config = changed(load(path).get_config(), override)
        config.data.root = "anywhere"
        train.check(config)
        if path.stem != "ablation" and str(config.model) not in built:  # is ablation_grid
            built.add(str(config.model))
            parameters(config)


def test_segnets_decoders_have_about_the_parameters_of_its_table():
    table = load(REPOSITORY / "experiments" / "camvid_segnet_table.py")
    for label, fields in table.VARIANTS.items():
        millions = parameters(changed(table.get_config(), fields)) / 1e6
        ((published, ours),) = re.findall(rf"\n +{label} +([\d.]+) +([\d.]+)\n", table.__doc__)
        assert round(millions, 3) == float(ours)
        assert millions == pytest.approx(float(published), rel=0.025)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_flags_say_the_same_as_the_overrides():
    """As the command line has them: class weights by name, tuples, a label."""
    table = load(REPOSITORY / "experiments" / "camvid_segnet_table.py")
    override = next(run for run in table.get_sweep() if run["label"] == "FCN-Basic")
    path = REPOSITORY / "experiments" / "camvid_segnet_table.py"
    command = ["command", f"--config={path}:reduced", *sweep.as_flags(override)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    values(command)
    fields = workdir.flatten(values.config.to_dict())
    assert override.items() <= fields.items()


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


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_every_loss_takes_its_options_from_the_config_and_no_others(loss):
    tried = {"per": "image", "absent": "one", "smooth": 1.0, "squared": True, "gamma": 2.0}
    tried |= {"class_weights": (1.0, 2.0), "label_smoothing": 0.1, "alpha": 0.3, "ce_weight": 2.0}
    valid = inspect.signature(losses.LOSSES[loss]).parameters
    logits, labels = np.zeros((1, 2, 2, 2), np.float32), np.zeros((1, 2, 2), np.int32)
    for option, value in tried.items():
        config = base.get_config()
        config.loss = loss
        config.loss_options[option] = value
        if option in valid:
            train.check(config)
            losses.LOSSES[loss](logits, labels, **{option: value})
        else:
            with pytest.raises(ValueError, match=f"loss_options.{option} is no option of"):
                train.check(config)


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_border_weights_need_a_loss_with_pixel_weights(loss):
    config = base.get_config()
    config.loss, config.border.weight = loss, 10.0
    if loss in ("cross_entropy", "dice_ce"):
        train.check(config)
    else:
        with pytest.raises(ValueError, match=f"'{loss}' has not: cross_entropy, dice_ce"):
            train.check(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("loss", "dise", "loss='dise' is not one of cross_entropy, soft_dice"),
        ("data.name", "imagenet", "data.name='imagenet' is not one of folder, records"),
        ("data.cache", "disk", "data.cache='disk' is not one of none, host, device"),
        ("optimizer.name", "lion", "optimizer.name='lion' is not one of adamw, sgd"),
        ("optimizer.schedule", "step", "optimizer.schedule='step' is not one of constant"),
        ("loss_options.smooth", 1.0, "loss_options.smooth is no option of loss='cross_entropy'"),
        (
            "model.normalization",
            "caffe",
            "model.normalization='caffe' is not one of unit, imagenet",
        ),
        ("optimizer.encoder_lr_multiplier", -1.0, "encoder_lr_multiplier=-1.0 must be at least 0"),
        (
            "loss_options.class_weights",
            "median",
            "class_weights='median' must be one number per class, or one of median_frequency, inv",
        ),
        ("num_steps", 0, "num_steps=0 must be at least 1"),
        ("num_microbatches", 0, "num_microbatches=0 must be at least 1"),
        ("eval_every", -1, "eval_every=-1 must be at least 1"),
        ("data.resolution", 0.0, "data.resolution=0.0 must be at least 1e-12"),
        ("border.weight", -1.0, "border.weight=-1.0 must be at least 0"),
        ("border.sigma", 0.0, "border.sigma=0.0 must be at least 1e-12"),
        ("augment.flip", 3.0, "augment.flip=3.0 must be from 0 to 1"),
        ("augment.scale", -1.5, "augment.scale=-1.5 must be at least 0"),
        ("augment.shear", 90.0, "augment.shear=90.0 must be from 0 to 89"),
        ("augment.max_class_fraction", 0.0, "max_class_fraction=0.0 must be from 1e-12 to 1"),
        ("optimizer.warmup_steps", -3, "optimizer.warmup_steps=-3 must be at least 0"),
        ("data.name", "folder", "data.root is not set: pass --config.data.root=FOLDER"),
        ("data.crop_size", (64,), r"data.crop_size=\(64,\) must be a height and a width"),
        ("seed", -1, "seed=-1 must be from 0 to 4294967295"),
        ("seed", 2**32, "seed=4294967296 must be from 0 to 4294967295"),
        ("optimizer.learning_rate", math.inf, "learning_rate=inf must be at least .*, and finite"),
        ("augment.noise", math.nan, "augment.noise=nan must be at least 0, and finite"),
        ("loss_options.class_weights", (1.0, -1.0), "must be numbers that are not negative"),
        ("loss_options.class_weights", (1.0, math.nan), "must be numbers that are not negative"),
        ("loss_options.class_weights", (0, 0), "not all 0: nothing would be learned"),
        ("loss_options.class_weights", "median_frequence", "; did you mean 'median_frequency'"),
        ("loss", "tversy", "; did you mean 'tversky'"),
        ("data.name", "camvit", "; did you mean 'camvid'"),
        ("batch_size", 6, "batch_size=6 .* multiple of the number of devices, 4"),
        ("num_microbatches", 4, "batch_size=8 .* devices, 4, times num_microbatches=4"),
    ],
)
def test_a_bad_value_is_named_with_the_valid_ones(field, value, message):
    config = base.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        train.check(config)


def test_fields_that_base_does_not_have_are_refused_all_at_once():
    config = base.get_config()
    config.batchsize, config.crop_size, config.optimizer.lr = 4, (8, 8), 0.1
    del config.eval.margin
    with config.ignore_type():
        config.num_steps, config.seed = "300", None
    with pytest.raises(ValueError, match="does not have the fields") as error:
        train.check(config)
    assert {line.strip() for line in str(error.value).splitlines()[1:]} == {
        "batchsize: no such field; did you mean 'batch_size'?",
        "crop_size: no such field; did you mean 'data.crop_size'?",
        "optimizer.lr: no such field",
        "eval.margin: missing",
        "num_steps='300': must be of type int",
        "seed=None: must be of type int",
    }


@pytest.mark.parametrize("field", ["saturation", "hue"])
def test_what_needs_rgb_is_refused_on_gray_before_anything_is_computed(field):
    config = base.get_config()
    config.augment[field] = 0.5
    batch = batch_shapes(config, config.data.crop_size, num_channels=1)
    run = assemble(config, num_classes=2, num_channels=1)
    with pytest.raises(ValueError, match=f"augment.{field}=0.5 needs images of 3 channels"):
        jax.eval_shape(run.train_step, run.shapes(), batch, jax.random.key(0))


def test_a_frozen_encoder_has_no_learning_rate():
    config = base.get_config()
    config.model.freeze_encoder = True
    train.check(config)
    config.optimizer.encoder_lr_multiplier = 0.1
    with pytest.raises(ValueError, match=r"nothing to optimizer\.encoder_lr_multiplier=0\.1"):
        train.check(config)
