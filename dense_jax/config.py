"""Declares every option: its default, its valid values, and its meaning with its unit.

`OPTIONS` is the only place that declares options, and `check` validates configs against it.
To add an option, add it to OPTIONS and run the command that generates experiments/base.py and the
tables of docs/configuration.md:

    python -m docs.generate

Registries such as losses.LOSSES are imported only when a value is checked, so that importing this
module never imports jax.
"""

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dense_jax.spelling import suggestion

_LOG = logging.getLogger("dense_jax")
# The types whose options also accept values of another type.
_ALSO: dict[type, Any] = {float: float | int, tuple: tuple | list}


class Option(NamedTuple):
    """One option of a config.

    default: The value in experiments/base.py. If `default` is a type, the option is
      unset (None) in base.py and accepts values of this type.
    valid: The valid values: an interval for a number or for each number in a tuple, such as
      "[0, 1)"; a tuple of names; a registry of names, such as "losses.LOSSES"; or "" for any value.
    meaning: The meaning of the option, with its unit.
    """

    default: Any
    valid: str | tuple[str, ...]
    meaning: str

    @property
    def type(self) -> type:
        return self.default if isinstance(self.default, type) else type(self.default)

    @property
    def is_unset(self) -> bool:
        return isinstance(self.default, type)

    @property
    def interval(self) -> str:
        """Returns `valid` if it is an interval, such as "[0, 1)". Otherwise returns ""."""
        if isinstance(self.valid, tuple) or not self.valid.startswith(("[", "(")):
            return ""
        return self.valid

    def names(self) -> list[str]:
        """Returns the valid names: the declared names, or the keys of the registry."""
        if not isinstance(self.valid, str):
            return list(self.valid)
        module, _, registry = self.valid.rpartition(".")
        return list(getattr(importlib.import_module(f"dense_jax.{module}"), registry))


# The text that introduces each section in the generated files.
SECTIONS = {
    "model": "Published weights are for RGB. A gray image is repeated three times. For other numbers "
    "n of channels, the first kernel is repeated in turn and multiplied by 3 / n.",
    "loss_options": "Unset: the loss's own default. Each loss has some of these. They are for all "
    "terms of a sum; a term's own, in parentheses, take precedence.",
    "model.upsampling_options": "Unset: the method's own default.",
    "model.auxiliary": "Heads on intermediate features, whose losses add to the loss in training.",
    "data": "With folds, fold `fold` of train_split is held out: it is evaluated instead of "
    'eval_split, by the name "fold", and the rest is trained on. ROOT/groups.csv, with lines '
    "NAME,GROUP, keeps groups of images, such as patients, in one fold. Without this file, folds "
    "are blocks of the images sorted by name.",
    "augment": "Drawn uniformly from [-value, value] unless stated otherwise; 0: off.",
    "border": "Extra weight of a pixel between objects, at the distances d1 and d2 from the "
    "nearest two: weight * exp(-(d1 + d2)^2 / (2 sigma^2)), as in the U-Net paper.",
}
# Each option is (default, valid, meaning), the fields of `Option`.
OPTIONS: dict[str, Any] = {
    "label": (str, "", "display name of the run in sweeps and reports"),
    "seed": (0, "[0, 4294967295]", "random seed for initial weights, data order and augmentation"),
    "num_seeds": (1, "[1, inf)", "seeds (seed, seed + 1, ...) to train at once"),
    "num_steps": (300, "[1, inf)", "optimizer steps"),
    "batch_size": (8, "[1, inf)", "images per step, over all hosts"),
    "num_microbatches": (1, "[1, inf)", "gradient accumulation steps, to save memory"),
    "ema_decay": (0.0, "[0, 1)", "decay of the averaged weights, which are evaluated; 0: off"),
    "eval_every": (100, "[1, inf)", "steps between evaluations; the last step is always evaluated"),
    "checkpoint_every": (100, "[1, inf)", "steps between checkpoints; evaluations also save one"),
    "log_every": (10, "[1, inf)", "steps between records of the training metrics"),
    "loss": (
        *("cross_entropy", ""),
        'one of losses.LOSSES, or a sum: "cross_entropy + 3 * tversky(alpha=0.3, beta=0.7)"',
    ),
    "loss_options": {
        "class_weights": (
            *(object, ""),
            'number per class or region | "median_frequency" | "inverse_frequency" | "segnet_camvid"',
        ),
        "label_smoothing": (float, "[0, 1]", "probability spread over all classes"),
        "per": (str, ("batch", "image"), "what overlaps are summed over"),
        "absent": (str, ("skip", "zero", "one"), "treatment of classes absent from the labels"),
        "smooth": (float, "[0, inf)", "pixels added to numerator and denominator"),
        "squared": (bool, "", "whether the denominator uses squared probabilities (V-Net)"),
        "include_background": (bool, "", "whether the mean includes class 0"),
        "alpha": (float, "[0, inf)", "weight of false positives (tversky)"),
        "beta": (float, "[0, inf)", "weight of false negatives (tversky)"),
        "gamma": (float, "[0, inf)", "focusing exponent (focal, tversky)"),
        "ce_weight": (float, "[0, inf)", "weight of the cross-entropy (dice_ce)"),
        "dice_weight": (float, "[0, inf)", "weight of the Dice loss (dice_ce)"),
        "top_k_fraction": (float, "(0, 1]", "fraction of hardest pixels to keep (cross_entropy)"),
        "iterations": (
            int,
            "[1, inf)",
            "erosions; at least the radius of structures in pixels (cldice)",
        ),
    },
    "model": {
        "name": ("unet", "models.decoders.DECODERS", "decoder"),
        "encoder": ("plain", "models.encoders.ENCODERS", "encoder"),
        "upsampling": ("transposed_conv", "models.upsampling.UPSAMPLERS", "upsampling method"),
        "upsampling_options": {
            "kernel_size": (int, "[1, inf)", "kernel size in output pixels (transposed_conv)"),
            "init": (str, "", '"bilinear" (transposed_conv) | "icnr" (pixel_shuffle)'),
            "learn": (bool, "", "False: keep the bilinear kernel fixed (transposed_conv)"),
        },
        "skips": (
            *(tuple, ""),
            "encoder strides to fuse; (): none; unset: all (fcn, unet), 4 (deeplabv3plus) or 4, 8, 16",
        ),
        "auxiliary": {
            "strides": (tuple, "", "a level of unet, or else the encoder's features; unset: none"),
            "weights": (tuple, "[0, inf)", "factor of the loss at each stride"),
        },
        "fusion": ("concat", ("concat", "add", "gated"), "how skips are fused (unet)"),
        "widths": ((16, 32, 64, 128), "[1, inf)", "channels at strides 1, 2, 4, ... (plain, unet)"),
        "norm": ("batch", ("batch", "group", "none"), "normalization layers"),
        "dtype": ("float32", ("float32", "bfloat16"), "data type of the computation"),
        "normalization": (
            *(str, "models.normalization.NORMALIZATIONS"),
            "input of the network; unset: the weights' own, or unit",
        ),
        "pretrained": (
            str,
            "",
            '"imagenet" (published weights of the encoder), their file, or hf://OWNER/NAME/FILE',
        ),
        "initialize_from": (
            str,
            "",
            "trained network to start from: workdir, exported file, or hf://OWNER/NAME[/FILE]",
        ),
        "freeze_encoder": (False, "", "True: keep the encoder's parameters and statistics fixed"),
        # Each encoder and decoder supports some of these options, and has its own defaults.
        "width_multiplier": (float, "(0, inf)", "factor on channels (encoders of published width)"),
        "dropout": (float, "[0, 1)", "dropout rate for the deepest features (or fc6 and fc7)"),
        "drop_path": (
            *(float, "[0, 1)"),
            "rate of skipping the last block (mobilenet, efficientnet, convnext, mit)",
        ),
        "output_stride": (
            *(int, "[8, 32]"),
            "deepest stride, 8, 16 or 32, by dilation (resnet, mobilenet, efficientnet)",
        ),
        "remat": (bool, "", "True: recompute activations to save memory (encoders, unet)"),
        "bottleneck": (bool, "", "False: the encoder ends with a max-pool (plain)"),
        "convs_per_level": (int, "[1, inf)", "convolutions at each stride (plain, unet)"),
        "kernel_size": (int, "[1, inf)", "kernel size of the convolutions, odd (plain, unet)"),
        "padding": (str, ("SAME", "VALID"), "padding of convolutions (unet with plain)"),
        "decoder_conv": (
            str,
            ("full", "depthwise", "none"),
            "convolutions after upsampling (unet)",
        ),
        "decoder_relu": (bool, "", "False: no ReLU in the decoder (unet)"),
        "decoder_channels": (
            *(int, "[1, inf)"),
            "channels of the decoder (fpn, deeplabv3plus, upernet, segformer)",
        ),
        "atrous_rates": (
            *(tuple, "[1, inf)"),
            "dilations of ASPP; unset: 96, 192 and 288 pixels / deepest stride (deeplabv3plus)",
        ),
        "gradual": (bool, "", "True: upsample by 2 at a time, even between skips (fcn)"),
        "zero_init": (bool, "", "whether the scores start at 0 (fcn)"),
        "score_scales": (tuple, "(-inf, inf)", "factor on each skip's features (fcn)"),
    },
    "data": {
        "name": ("synthetic", "data.DATASETS", "dataset"),
        "root": ("", "", "folder of the dataset"),
        "train_split": ("train", "", "split to train on"),
        "eval_split": ("val", "", "split to evaluate during training"),
        "folds": (
            *(int, "[2, inf)"),
            "parts of train_split, one of which is evaluated instead of eval_split; unset: off",
        ),
        "fold": (0, "[0, inf)", "the part, from 0, that is evaluated and not trained on"),
        "crop_size": ((64, 64), "", "height and width of the training crops, pixels"),
        "resolution": (1.0, "(0, inf)", "resolution of the network's input, relative to the files"),
        "canvas_size": (tuple, "", "size to pad or crop to; unset: the largest image"),
        "repeat_threshold": (
            *(0.0, "[0, 1]"),
            "images of classes that are in less than this fraction of images are drawn more often",
        ),
        "workers": (0, "[0, inf)", "decoding processes per seed on this host; 0: threads"),
        "cache": (
            *("none", ("none", "host", "device")),
            "where to keep decoded images; device: evaluation images on the host",
        ),
        "verify": (True, "", "whether to open every file once before the first training"),
    },
    "augment": {
        "flip": (0.5, "[0, 1]", "probability of a left-right flip"),
        "flip_vertical": (0.0, "[0, 1]", "probability of a top-bottom flip"),
        "scale": (0.0, "[0, inf)", "zoom, log-uniform between 1 / (1 + scale) and 1 + scale"),
        "rotation": (0.0, "[0, 180]", "degrees"),
        "shear": (0.0, "[0, 89]", "degrees by which vertical lines lean"),
        "elastic": (0.0, "[0, inf)", "standard deviation of shifts on a 3 x 3 grid, input pixels"),
        "max_class_fraction": (1.0, "(0, 1]", "crops with more of one class are redrawn; 1: off"),
        "class_crop": (0.0, "[0, 1]", "probability that a crop shows a pixel of a random class"),
        "class_mix": (0.0, "[0, 1]", "probability of pasting classes of another image (ClassMix)"),
        "brightness": (0.0, "[0, 1]", "factor 1 +- brightness"),
        "contrast": (0.0, "[0, 1]", "factor 1 +- contrast on differences from the mean luma"),
        "saturation": (0.0, "[0, 1]", "factor 1 +- saturation on differences from luma (RGB)"),
        "hue": (0.0, "[0, 180]", "degrees (RGB)"),
        "gamma": (0.0, "[0, inf)", "exponent, log-uniform between 1 / (1 + gamma) and 1 + gamma"),
        "blur": (0.0, "[0, inf)", "largest standard deviation of a Gaussian, input pixels"),
        "noise": (0.0, "[0, inf)", "largest standard deviation, in gray levels (0 to 255)"),
        "offset": (0.0, "[0, 255]", "gray levels added to all values"),
    },
    "border": {
        "weight": (0.0, "[0, inf)", "weight added to the pixel's class weight; 0: off"),
        "sigma": (5.0, "(0, inf)", "pixels of the files' labels"),
        "classes": (tuple, "", "classes whose components are the objects; unset: instance files"),
    },
    "optimizer": {
        "name": ("adamw", "training.optim.OPTIMIZERS", "optimizer"),
        "learning_rate": (0.01, "(0, inf)", "highest learning rate"),
        "encoder_lr_multiplier": (1.0, "[0, inf)", "factor on the encoder's learning rate"),
        "schedule": ("cosine", "training.optim.SCHEDULES", "learning rate after the warmup"),
        "warmup_steps": (20, "[0, inf)", "steps in which the learning rate rises from 0"),
        "momentum": (0.9, "[0, 1)", "momentum, or Adam's first-moment decay"),
        "weight_decay": (0.0001, "[0, inf)", "weight decay, except for norms and biases"),
        "grad_clip_norm": (1.0, "[0, inf)", "largest global norm of the gradient; 0: off"),
        "sharded": (False, "", "True: split optimizer moments over devices, to save memory"),
    },
    "eval": {
        "tile_size": ((1024, 1024), "", "largest height and width of a tile, with margins, pixels"),
        "margin": (64, "[0, inf)", "margin around a tile's core, pixels; small images have none"),
        "batch_size": (8, "[1, inf)", "tiles per step, over all hosts"),
        "num_images": (
            *(int, "[1, inf)"),
            "images per evaluation in training, evenly spaced in the split; unset: all",
        ),
        "num_pictures": (4, "[0, inf)", "pictures of predictions and errors per evaluation"),
    },
}


def check(config: ConfigDict) -> None:
    """Raises ValueError if a config is invalid. The message names the option and valid values."""
    _check_fields(config)
    check_values(config)
    _check_loss(config)
    _check_combinations(config)


def _check_fields(config: ConfigDict) -> None:
    """Raises ValueError if options are unknown, missing or of the wrong type. Lists them all."""
    options, values = declared(), dict(_flatten(config))
    wrong = [f"{path}: missing" for path in options if path not in values]
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        if path not in options:
            # Suggests a similar name in the same section, or the same name in another section.
            split = [valid.rpartition(".") for valid in options]
            near = {leaf: a + dot + leaf for a, dot, leaf in split if a == section or leaf == name}
            wrong.append(f"{path}: no such option{suggestion(name, near, near)}")
        elif problem := _type_problem(path, options[path], value):
            wrong.append(problem)
    if wrong:
        raise ValueError(
            "the config does not have the options of experiments/base.py:\n  " + "\n  ".join(wrong)
        )


def check_values(config: ConfigDict, section: str = "") -> None:
    """Raises ValueError for the first value that is not valid for its option.

    section: The prefix of the options to check, such as "model.". If empty, checks all options.
    """
    options = declared()
    for path, value in _flatten(config):
        if path.startswith(section) and (problem := _value_problem(path, options[path], value)):
            raise ValueError(problem)


def _type_problem(path: str, option: Option, value: Any) -> str:
    """Returns what is wrong with the type of an option's value, or ""."""
    if value is None and option.is_unset:
        return ""
    accepted = _ALSO.get(option.type, option.type)
    wrong = f"{path}={value!r}: must be of type {option.type.__name__}"
    return "" if isinstance(value, accepted) else wrong


def _value_problem(path: str, option: Option, value: Any) -> str:
    """Returns what is wrong with an option's value, which has the right type, or ""."""
    if not option.valid or value is None:
        return ""
    if option.interval:
        numbers = value if isinstance(value, tuple | list) else [value]
        inside = all(_is_within(number, option.interval) for number in numbers)
        return "" if inside else f"{path}={value} must be in {option.interval}"
    if value in (names := option.names()):
        return ""
    return f"{path}={value!r} is not one of {', '.join(names)}{suggestion(value, names)}"


def _is_within(number: Any, interval: str) -> bool:
    """Returns whether a number lies in an interval such as "[0, 1)". NaN lies in no interval."""
    if not isinstance(number, int | float):
        return False
    low, high = map(float, interval[1:-1].split(","))
    above = number > low or (number == low and interval.startswith("["))
    return above and (number < high or (number == high and interval.endswith("]")))


def _check_loss(config: ConfigDict) -> None:
    """Raises ValueError if the loss is no sum of losses, or if one of their options is invalid."""
    losses = importlib.import_module("dense_jax.losses")
    balance = importlib.import_module("dense_jax.data.balance")
    terms = losses.terms(config.loss)
    shared = {name: value for name, value in config.loss_options.items() if value is not None}
    methods = [*balance.METHODS, *balance.PUBLISHED]
    _check_loss_options("loss_options.", shared, f"loss={config.loss!r}", terms, methods)
    for term in terms:
        _check_loss_options(f"{term.name}: ", term.options, term.name, [term])
    if config.border.weight > 0 and not any("pixel_weights" in term.accepted for term in terms):
        every = (losses.Term(1, name, {}) for name in losses.LOSSES)
        able = [term.name for term in every if "pixel_weights" in term.accepted]
        raise ValueError(
            f"border.weight={config.border.weight} needs a loss with pixel weights: "
            f"{', '.join(able)}, not {config.loss!r}"
        )


def _check_loss_options(
    prefix: str, given: Mapping[str, Any], owner: str, terms: Sequence, methods: Sequence[str] = ()
) -> None:
    """Raises ValueError for the first option that no term has, or whose value is invalid.

    methods: The names that stand for class weights.
    """
    options = {name: Option(*option) for name, option in OPTIONS["loss_options"].items()}
    own = [name for name in options if any(name in term.accepted for term in terms)]
    for name, value in given.items():
        path = prefix + name
        if name not in own:
            raise ValueError(
                f"{path} is no option of {owner}, which has: {', '.join(own)}"
                f"{suggestion(name, own)}"
            )
        option = options[name]
        if problem := _type_problem(path, option, value) or _value_problem(path, option, value):
            raise ValueError(problem)
        if name == "class_weights":
            _check_class_weights(path, value, methods)


def _check_class_weights(path: str, weights: Any, methods: Sequence[str]) -> None:
    if isinstance(weights, tuple | list):
        if not all(_is_within(weight, "[0, inf)") for weight in weights) or not any(weights):
            raise ValueError(
                f"{path}={weights} must be in [0, inf), and not all 0: nothing would be learned"
            )
    elif weights is not None and weights not in methods:
        names = f", or one of {', '.join(methods)}" if methods else ""
        raise ValueError(
            f"{path}={weights!r} must be one number per class{names}"
            f"{suggestion(str(weights), methods)}"
        )


def _check_combinations(config: ConfigDict) -> None:
    """Raises ValueError if a size is malformed or if options are incompatible."""
    for section, name in (("data", "crop_size"), ("data", "canvas_size"), ("eval", "tile_size")):
        size = config[section][name]
        if size is not None and not (
            len(size) == 2 and all(isinstance(length, int) and length > 0 for length in size)
        ):
            raise ValueError(
                f"{section}.{name}={tuple(size)} must be a height and a width in pixels"
            )
    if config.seed + config.num_seeds > 2**32:  # jax.random.key accepts 32 bits
        raise ValueError(
            f"seed={config.seed} with num_seeds={config.num_seeds}: seeds must be below 2**32"
        )
    if config.augment.class_mix > 0 and config.batch_size == config.num_microbatches:
        raise ValueError(
            f"augment.class_mix={config.augment.class_mix} mixes the images of a microbatch, and "
            f"batch_size={config.batch_size} with num_microbatches={config.num_microbatches} leaves "
            "only one"
        )
    if config.data.fold >= (config.data.folds or 1):
        raise ValueError(
            f"data.fold={config.data.fold} must be below data.folds={config.data.folds}, "
            "the number of folds"
        )
    if config.model.kernel_size is not None and config.model.kernel_size % 2 == 0:
        raise ValueError(f"model.kernel_size={config.model.kernel_size} must be odd")
    if config.optimizer.warmup_steps >= config.num_steps:
        _LOG.warning(
            "optimizer.warmup_steps=%d of num_steps=%d: learning_rate is never reached",
            *(config.optimizer.warmup_steps, config.num_steps),
        )
    if config.model.pretrained and config.model.initialize_from:
        raise ValueError(
            f"model.pretrained={config.model.pretrained!r} and model.initialize_from="
            f"{config.model.initialize_from!r} both have weights for the encoder: unset one of them"
        )
    if config.model.freeze_encoder and config.optimizer.encoder_lr_multiplier != 1:
        raise ValueError(
            "model.freeze_encoder leaves nothing to optimizer.encoder_lr_multiplier="
            f"{config.optimizer.encoder_lr_multiplier}: leave one of them at its default"
        )
    if not config.data.root and not config.data.name.startswith("synthetic"):
        raise ValueError(
            f"data.root is not set: pass --config.data.root=FOLDER, the folder of "
            f"{config.data.name!r}"
        )


def declared() -> dict[str, Option]:
    """Returns {dotted.path: option} for all options."""
    return {path: Option(*declared) for path, declared in _flatten(OPTIONS)}


def _flatten(nested: Mapping | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted.path, value) for every value in nested sections."""
    for name, value in nested.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
