"""What a config may say: the checks that need neither data nor model."""

import functools
import inspect
import logging
import math
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dense_jax import command, data, losses, models
from dense_jax.data import balance
from dense_jax.models.normalization import NORMALIZATIONS
from dense_jax.spelling import suggestion
from dense_jax.training import optim

_LOG = logging.getLogger("dense_jax")
# By its path: a project may have a package of its own called `experiments`.
BASE = Path(__file__).parent.parent / "experiments" / "base.py"
CACHES = ("none", "host", "device")
# The types whose fields may also hold values of others.
_ALSO: dict[type, Any] = {float: float | int, tuple: tuple | list}


def check(config: ConfigDict) -> None:
    """Raises ValueError, naming the field and its valid values, for what no run can be made of."""
    _check_fields(config)
    for field, value, valid in (
        ("loss", config.loss, losses.LOSSES),
        ("data.name", config.data.name, data.DATASETS),
        ("data.cache", config.data.cache, CACHES),
        ("optimizer.name", config.optimizer.name, optim.OPTIMIZERS),
        ("optimizer.schedule", config.optimizer.schedule, optim.SCHEDULES),
        ("model.normalization", config.model.normalization or "unit", NORMALIZATIONS),
    ):
        if value not in valid:
            raise ValueError(
                f"{field}={value!r} is not one of {', '.join(valid)}{suggestion(value, valid)}"
            )
    valid = list(inspect.signature(losses.LOSSES[config.loss]).parameters)[2:]
    for option in models.given(config.loss_options):
        if option not in valid:
            raise ValueError(
                f"loss_options.{option} is no option of loss={config.loss!r}, which has: "
                f"{', '.join(valid)}{suggestion(option, valid)}"
            )
    if config.border.weight > 0 and "pixel_weights" not in valid:
        able = [
            name
            for name, loss in losses.LOSSES.items()
            if "pixel_weights" in inspect.signature(loss).parameters
        ]
        raise ValueError(
            f"border.weight={config.border.weight} needs a loss with pixel weights, which "
            f"{config.loss!r} has not: {', '.join(able)}"
        )
    weights = config.loss_options.class_weights
    names = [*balance.METHODS, *balance.PUBLISHED]
    if not (weights is None or isinstance(weights, tuple | list) or weights in names):
        raise ValueError(
            f"loss_options.class_weights={weights!r} must be one number per class, or one of "
            f"{', '.join(names)}{suggestion(str(weights), names)}"
        )
    if isinstance(weights, tuple | list) and not (
        all(isinstance(w, int | float) and 0 <= w < math.inf for w in weights) and any(weights)
    ):
        raise ValueError(
            f"loss_options.class_weights={weights} must be numbers that are not negative, and not "
            "all 0: nothing would be learned"
        )
    for fields, low, high in (
        (("num_steps", "batch_size", "eval_every", "checkpoint_every", "log_every"), 1, math.inf),
        (("num_microbatches", "num_seeds", "eval.batch_size"), 1, math.inf),
        (("seed",), 0, 2**32 - config.num_seeds),  # jax.random.key looks at 32 bits
        (("data.resolution", "optimizer.learning_rate", "border.sigma"), 1e-12, math.inf),
        (("augment.flip", "augment.flip_vertical"), 0, 1),
        (("augment.brightness", "augment.contrast", "augment.saturation"), 0, 1),
        (("augment.rotation", "augment.hue"), 0, 180),
        (("augment.shear",), 0, 89),
        (("augment.scale", "augment.elastic", "augment.gamma"), 0, math.inf),
        (("augment.blur", "augment.noise"), 0, math.inf),
        (("augment.max_class_fraction",), 1e-12, 1),
        (("ema_decay", "optimizer.momentum"), 0, 1 - 1e-12),
        (("optimizer.weight_decay", "optimizer.grad_clip_norm"), 0, math.inf),
        (("eval.margin", "eval.num_pictures", "data.workers", "border.weight"), 0, math.inf),
        (("optimizer.warmup_steps", "optimizer.encoder_lr_multiplier"), 0, math.inf),
        (("loss_options.smooth", "loss_options.alpha", "loss_options.beta"), 0, math.inf),
        (("loss_options.ce_weight", "loss_options.dice_weight"), 0, math.inf),
        (("loss_options.gamma",), 0, math.inf),
        (("loss_options.label_smoothing",), 0, 1),
        (("loss_options.top_k_fraction",), 1e-12, 1),
    ):
        for field in fields:
            value = _get(config, field)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:.10g}"
                finite = "" if math.isfinite(value) else ", and finite"
                raise ValueError(f"{field}={value} must be {limits}{finite}")
    for field in ("data.crop_size", "data.canvas_size", "eval.tile_size"):
        size = _get(config, field)
        if size is not None and not (
            len(size) == 2 and all(isinstance(length, int) and length > 0 for length in size)
        ):
            raise ValueError(f"{field}={tuple(size)} must be a height and a width in pixels")
    if config.optimizer.warmup_steps >= config.num_steps:
        _LOG.warning(
            "optimizer.warmup_steps=%d of num_steps=%d: learning_rate is never reached",
            *(config.optimizer.warmup_steps, config.num_steps),
        )
    if config.model.freeze_encoder and config.optimizer.encoder_lr_multiplier != 1:
        raise ValueError(
            "model.freeze_encoder leaves nothing to optimizer.encoder_lr_multiplier="
            f"{config.optimizer.encoder_lr_multiplier}: leave one of them at its default"
        )
    if not config.data.root and not config.data.name.startswith("synthetic"):
        raise ValueError(
            f"data.root is not set: pass --config.data.root=FOLDER, that of {config.data.name!r}"
        )
    check_devices(config)


def _check_fields(config: ConfigDict) -> None:
    """Raises ValueError, listing all, for fields that are not those of experiments/base.py."""
    valid, given = _fields(command.experiment(str(BASE)).get_config()), _fields(config)
    wrong = [f"{field}: missing" for field in valid if field not in given]
    for field, (_, value) in given.items():
        section, _, name = field.rpartition(".")
        if field not in valid:
            # Near it in its own section, or of its very name in another.
            split = [path.rpartition(".") for path in valid]
            paths = {leaf: a + dot + leaf for a, dot, leaf in split if a == section or leaf == name}
            wrong.append(f"{field}: no such field{suggestion(name, paths, paths)}")
            continue
        wanted, default = valid[field]
        is_unset = value is None and default is None
        if not is_unset and not isinstance(value, _ALSO.get(wanted, wanted)):
            wrong.append(f"{field}={value!r}: must be of type {wanted.__name__}")
    if wrong:
        raise ValueError(
            "the config does not have the fields of experiments/base.py:\n  " + "\n  ".join(wrong)
        )


def _fields(config: ConfigDict, prefix: str = "") -> dict[str, tuple[type, Any]]:
    """Returns {dotted.path: (type, value)}."""
    fields: dict[str, tuple[type, Any]] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            fields |= _fields(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = config.get_type(name), value
    return fields


def check_devices(config: ConfigDict) -> None:
    """Raises ValueError if the devices cannot share seeds and batch evenly."""
    num_devices, num_seeds = jax.device_count(), config.num_seeds
    if num_devices % num_seeds or (
        num_seeds % jax.process_count() and jax.process_count() % num_seeds
    ):
        raise ValueError(
            f"num_seeds={num_seeds} cannot share {num_devices} devices of {jax.process_count()} "
            "hosts evenly: it must divide the devices, and divide the hosts or be a multiple of them"
        )
    if config.batch_size % (config.num_microbatches * (num_devices // num_seeds)):
        each = f", for each of num_seeds={num_seeds}" if num_seeds > 1 else ""
        raise ValueError(
            f"batch_size={config.batch_size} is the global batch and must be a multiple of the "
            f"number of devices, {num_devices // num_seeds}{each}, times "
            f"num_microbatches={config.num_microbatches}"
        )


def _get(config: ConfigDict, field: str) -> Any:
    return functools.reduce(lambda value, name: value[name], field.split("."), config)
