"""Tests that every option is declared once, and that invalid options give helpful errors."""

import inspect
import math
import re

import numpy as np
import pytest

from dense_jax import config as options
from dense_jax import losses
from docs import generate
from experiments import base
from tests.conftest import REPOSITORY


def test_the_generated_files_are_those_of_the_declarations():
    """After a change of config.OPTIONS: python -m docs.generate."""
    assert (REPOSITORY / "experiments" / "base.py").read_text() == generate.base_file()
    assert (REPOSITORY / "docs" / "configuration.md").read_text() == generate.tables()


def test_base_has_the_declared_options_types_and_defaults():
    config = base.get_config()
    for path, option in options.declared().items():
        section, _, name = f"config.{path}".rpartition(".")
        fields = eval(section, {"config": config})
        assert fields.get_type(name) is option.type
        assert fields[name] == (None if option.is_unset else option.default)
    options.check(config)


def test_every_valid_value_can_be_looked_up():
    for path, option in options.declared().items():
        if option.valid and not option.interval:
            assert option.is_unset or option.default in option.names(), path


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_every_loss_takes_its_options_from_the_config_and_no_others(loss):
    tried = {"per": "image", "absent": "one", "smooth": 1.0, "squared": True, "gamma": 2.0}
    tried |= {"class_weights": (1.0, 2.0), "label_smoothing": 0.1, "alpha": 0.3, "ce_weight": 2.0}
    tried |= {"iterations": 2, "include_background": True}
    valid = inspect.signature(losses.LOSSES[loss]).parameters
    logits, labels = np.zeros((1, 2, 2, 2), np.float32), np.zeros((1, 2, 2), np.int32)
    fields = {field: np.ones(logits.shape) for field in losses.terms(loss)[0].fields}
    for option, value in tried.items():
        config = base.get_config()
        config.loss = loss
        config.loss_options[option] = value
        if option in valid:
            options.check(config)
            losses.LOSSES[loss](logits, labels, **fields, **{option: value})
        else:
            with pytest.raises(ValueError, match=f"loss_options.{option} is no option of"):
                options.check(config)


@pytest.mark.parametrize("loss", [*losses.LOSSES, "focal + soft_dice", "3 * soft_dice + dice_ce"])
def test_border_weights_need_a_loss_with_pixel_weights(loss):
    config = base.get_config()
    config.loss, config.border.weight = loss, 10.0
    if loss in ("cross_entropy", "dice_ce", "3 * soft_dice + dice_ce"):
        options.check(config)
    else:
        with pytest.raises(ValueError, match=f"cross_entropy, dice_ce, not '{re.escape(loss)}'"):
            options.check(config)


def test_the_options_of_a_sum_are_those_of_its_terms():
    config = base.get_config()
    config.loss = "cross_entropy(class_weights=None) + 3 * tversky(alpha=0.3, beta=0.7)"
    config.loss_options.update({"label_smoothing": 0.1, "absent": "zero", "alpha": 0.5})
    config.loss_options.class_weights = "median_frequency"
    options.check(config)
    config.loss_options.ce_weight = 0.5
    with pytest.raises(
        ValueError, match=r"ce_weight is no option of loss='cross_.*: class_weights"
    ):
        options.check(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("loss", "dise", "loss='dise' is not one of cross_entropy, soft_dice"),
        ("loss", "tversy", "; did you mean 'tversky'"),
        ("loss", "focal + tversy", "loss='tversy' is not one of .*; did you mean 'tversky'"),
        ("loss", "focal + alpha * tversky", "a sum of losses and their options, such as"),
        ("loss", "focal(alpha=1)", "focal: alpha is no option of focal, which has: class_weights"),
        ("loss", "focal(gama=1)", "focal: gama is no option .*; did you mean 'gamma'"),
        ("loss", "boundary(distances=1)", "boundary: distances is no option of boundary"),
        ("loss", "focal(gamma='a')", "focal: gamma='a': must be of type float"),
        ("loss", "focal(gamma=-1)", r"focal: gamma=-1 must be in \[0, inf\)"),
        ("loss", "soft_dice(per='a')", "soft_dice: per='a' is not one of batch, image"),
        ("loss", "focal(class_weights=(0, 0))", "focal: class_weights=.* not all 0"),
        ("loss", "focal(class_weights='a')", "class_weights='a' must be one number per class$"),
        ("data.name", "imagenet", "data.name='imagenet' is not one of folder, records"),
        ("data.name", "camvit", "; did you mean 'camvid'"),
        ("data.cache", "disk", "data.cache='disk' is not one of none, host, device"),
        ("model.encoder", "vgg", "is not one of plain, .*; did you mean 'vgg16'"),
        ("model.dtype", "float16", "model.dtype='float16' is not one of float32, bfloat16"),
        ("model.normalization", "caffe", "normalization='caffe' is not one of unit, imagenet"),
        ("optimizer.name", "lion", "optimizer.name='lion' is not one of adamw, sgd"),
        ("optimizer.schedule", "step", "optimizer.schedule='step' is not one of constant"),
        ("loss_options.per", "pixel", "loss_options.per='pixel' is not one of batch, image"),
        ("loss_options.smooth", 1.0, "loss_options.smooth is no option of loss='cross_entropy'"),
        ("optimizer.encoder_lr_multiplier", -1.0, r"multiplier=-1.0 must be in \[0, inf\)"),
        ("num_steps", 0, r"num_steps=0 must be in \[1, inf\)"),
        ("num_microbatches", 0, r"num_microbatches=0 must be in \[1, inf\)"),
        ("eval_every", -1, r"eval_every=-1 must be in \[1, inf\)"),
        ("data.resolution", 0.0, r"data.resolution=0.0 must be in \(0, inf\)"),
        ("border.weight", -1.0, r"border.weight=-1.0 must be in \[0, inf\)"),
        ("border.sigma", 0.0, r"border.sigma=0.0 must be in \(0, inf\)"),
        ("augment.flip", 3.0, r"augment.flip=3.0 must be in \[0, 1\]"),
        ("augment.scale", -1.5, r"augment.scale=-1.5 must be in \[0, inf\)"),
        ("augment.shear", 90.0, r"augment.shear=90.0 must be in \[0, 89\]"),
        ("augment.max_class_fraction", 0.0, r"max_class_fraction=0.0 must be in \(0, 1\]"),
        ("augment.class_mix", 1.5, r"augment.class_mix=1.5 must be in \[0, 1\]"),
        ("augment.noise", math.nan, r"augment.noise=nan must be in \[0, inf\)"),
        ("optimizer.warmup_steps", -3, r"optimizer.warmup_steps=-3 must be in \[0, inf\)"),
        ("optimizer.learning_rate", math.inf, r"learning_rate=inf must be in \(0, inf\)"),
        ("ema_decay", 1.0, r"ema_decay=1.0 must be in \[0, 1\)"),
        ("seed", -1, r"seed=-1 must be in \[0, 4294967295\]"),
        ("seed", 2**32, r"seed=4294967296 must be in \[0, 4294967295\]"),
        ("model.widths", (8, 0), r"model.widths=\(8, 0\) must be in \[1, inf\)"),
        ("model.score_scales", (1.0, math.nan), r"score_scales=\(1.0, nan\) must be in \(-inf"),
        ("model.dropout", 1.0, r"model.dropout=1.0 must be in \[0, 1\)"),
        ("model.kernel_size", 4, "model.kernel_size=4 must be odd"),
        ("data.name", "folder", "data.root is not set: pass --config.data.root=FOLDER"),
        ("data.crop_size", (64,), r"data.crop_size=\(64,\) must be a height and a width"),
        ("data.canvas_size", (8.0, 8), r"data.canvas_size=\(8.0, 8\) must be a height and a width"),
        ("loss_options.class_weights", (1.0, -1.0), r"must be in \[0, inf\)"),
        ("loss_options.class_weights", (1.0, math.nan), r"must be in \[0, inf\)"),
        ("loss_options.class_weights", (0, 0), "not all 0: nothing would be learned"),
        (
            "loss_options.class_weights",
            "median_frequence",
            "must be one number per class, or one of median_frequency, .*; did you mean 'median_f",
        ),
    ],
)
def test_a_bad_value_is_named_with_the_valid_ones(path, value, message):
    config = base.get_config()
    config.update_from_flattened_dict({path: value})
    with pytest.raises(ValueError, match=message):
        options.check(config)


def test_the_last_seed_must_be_one():
    config = base.get_config()
    config.seed, config.num_seeds = 2**32 - 2, 2
    options.check(config)
    config.num_seeds = 3
    with pytest.raises(ValueError, match="with num_seeds=3: seeds must be below"):
        options.check(config)


def test_one_section_may_be_checked_alone():
    config = base.get_config()
    config.data.name = "imagenet"
    options.check_values(config, "model.")
    config.model.name = "unnet"
    with pytest.raises(ValueError, match=r"model.name='unnet' is not one of .*'unet'"):
        options.check_values(config, "model.")


def test_options_that_are_not_declared_are_refused_all_at_once():
    config = base.get_config()
    config.batchsize, config.crop_size, config.optimizer.lr = 4, (8, 8), 0.1
    del config.eval.margin
    with config.ignore_type():
        config.num_steps, config.seed = "300", None
    with pytest.raises(ValueError, match="does not have the options") as error:
        options.check(config)
    assert {line.strip() for line in str(error.value).splitlines()[1:]} == {
        "batchsize: no such option; did you mean 'batch_size'?",
        "crop_size: no such option; did you mean 'data.crop_size'?",
        "optimizer.lr: no such option",
        "eval.margin: missing",
        "num_steps='300': must be of type int",
        "seed=None: must be of type int",
    }


def test_an_encoder_begins_with_one_set_of_weights():
    config = base.get_config()
    config.model.initialize_from = "runs/before"
    options.check(config)
    config.model.pretrained = "imagenet"
    with pytest.raises(ValueError, match=r"both have weights for the encoder: unset one"):
        options.check(config)


def test_a_frozen_encoder_has_no_learning_rate():
    config = base.get_config()
    config.model.freeze_encoder = True
    options.check(config)
    config.optimizer.encoder_lr_multiplier = 0.1
    with pytest.raises(ValueError, match=r"nothing to optimizer\.encoder_lr_multiplier=0\.1"):
        options.check(config)


def test_a_single_image_has_no_other_to_mix_with():
    config = base.get_config()
    config.augment.class_mix, config.batch_size, config.num_microbatches = 0.5, 4, 2
    options.check(config)
    config.num_microbatches = 4
    with pytest.raises(ValueError, match=r"batch_size=4 with num_microbatches=4 leaves only one"):
        options.check(config)


@pytest.mark.parametrize(
    ("num_folds", "fold", "message"),
    [
        (5, 5, "data.fold=5 must be below data.folds=5, the number of folds"),
        (None, 1, "data.fold=1 must be below data.folds=None, the number of folds"),
        (1, 0, "data.folds=1 must be in [2, inf)"),
        (5, 4, ""),
    ],
)
def test_the_fold_is_one_of_the_folds(num_folds, fold, message):
    config = base.get_config()
    config.data.folds, config.data.fold = num_folds, fold
    if not message:
        options.check(config)
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            options.check(config)
