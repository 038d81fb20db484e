"""Models for dense prediction: encoder x decoder x upsampling x skips, all config fields.

`build(config.model, num_classes)` returns a Module called `model.apply(variables, image, train=...)`.
The image is float [b, h, w, 1 or 3], already normalized, of any height and width >= 1. The result is
float32 logits [b, h, w, num_classes] at the image's resolution.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp

from dense_jax.models.decoders import DECODERS
from dense_jax.models.decoders.unet import CONVS, FUSIONS
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.layers import NORMS, PADDINGS
from dense_jax.models.segmenter import Segmenter
from dense_jax.models.upsampling import UPSAMPLERS, Upsampler
from dense_jax.spelling import suggestion

DTYPES = ("float32", "bfloat16")
CHOICES: dict[str, Iterable[str]] = {
    "name": DECODERS,
    "encoder": ENCODERS,
    "upsampling": UPSAMPLERS,
    "fusion": FUSIONS,
    "norm": NORMS,
    "dtype": DTYPES,
    "padding": PADDINGS,
    "decoder_conv": CONVS,
}
OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "width_multiplier": ("positive", lambda value: 0 < value < math.inf),
    "dropout": ("from 0 to below 1", lambda value: 0 <= value < 1),
    "convs_per_level": ("at least 1", lambda value: value >= 1),
    "kernel_size": ("odd and positive", lambda value: value > 0 and value % 2 == 1),
    "score_scales": (
        "numbers",
        lambda value: all(isinstance(x, float | int) and math.isfinite(x) for x in value),
    ),
    "widths": (
        "one or more positive numbers of channels",
        lambda value: value and all(isinstance(width, int) and width > 0 for width in value),
    ),
}
# Fields of config.model that are no option of an encoder or a decoder.
_OTHERS = {"name", "encoder", "upsampling", "upsampling_options", "skips"}
_OTHERS |= {"normalization", "pretrained", "freeze_encoder"}
# Options that every config sets, whether or not its encoder or decoder has them.
_ALWAYS_SET = {"widths", "fusion", "norm", "dtype"}


def build(config: Any, num_classes: int) -> Segmenter:
    """Makes the model that the fields of `config.model` describe.

    Raises ValueError, naming the valid values, for fields that do not make a model.
    """
    set_fields = given(config)
    for field, valid in CHOICES.items():
        if field in set_fields:
            _check(f"model.{field}", config[field], valid)
    for field, (what, is_valid) in OPTIONS.items():
        if field in set_fields and not is_valid(config[field]):
            raise ValueError(f"model.{field}={config[field]!r} must be {what}")
    make_encoder, make_decoder = ENCODERS[config.encoder].make, DECODERS[config.name]
    options = {name: value for name, value in set_fields.items() if name not in _OTHERS}
    for name in options.keys() - _ALWAYS_SET - _fields(make_encoder) - _fields(make_decoder):
        raise ValueError(
            f"model.{name}={options[name]!r}: neither {config.name!r} nor {config.encoder!r} has it; "
            "leave it unset"
        )
    options["dtype"] = jnp.dtype(config.dtype)

    encoder = _make(make_encoder, {**make_decoder.encoder_options} | options)
    if config.freeze_encoder and encoder.dropout:
        raise ValueError(
            f"model.dropout={encoder.dropout} would do nothing: with model.freeze_encoder the "
            "encoder is as in evaluation; set model.dropout=0"
        )
    below_deepest = encoder.spec.strides[:-1]
    skips = below_deepest if config.skips is None else tuple(config.skips)
    for stride in skips:
        _check("model.skips", stride, below_deepest)
    if len(set(skips)) < len(skips):
        raise ValueError(f"model.skips={skips} has a stride twice")
    own = {"num_classes": num_classes, "skips": skips, "upsample": _upsampler(config)}
    decoder = _make(make_decoder, options | own)
    decoder.check(encoder.spec)
    return Segmenter(encoder, decoder, freeze_encoder=config.freeze_encoder)


def _upsampler(config: Any) -> Callable[..., Upsampler]:
    """Returns a maker of upsamplers with `config.upsampling_options` and `config.dtype`."""
    make, options = UPSAMPLERS[config.upsampling], given(config.upsampling_options)
    others = {"features", "factor", "dtype", "enlarge", "conv_general_dilated", "parent", "name"}
    valid = sorted(_fields(make) - others)
    for option in options:
        _check(f"upsampling_options of {config.upsampling!r}", option, valid)
    upsample = functools.partial(make, dtype=jnp.dtype(config.dtype), **options)
    upsample(features=1)  # raises for wrong values of the options
    return upsample


def _fields(part: Callable) -> set[str]:
    parameters = inspect.signature(part).parameters.values()
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}


def _make(part: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Makes an encoder or a decoder with those of the options that it has."""
    return part(**{name: value for name, value in options.items() if name in _fields(part)})


def _check(what: str, value: Any, valid: Iterable[Any]) -> None:
    if value not in valid:
        names = [str(name) for name in valid]
        raise ValueError(
            f"{what}: {value!r} is not one of {', '.join(map(repr, valid)) or 'none'}"
            f"{suggestion(str(value), names)}"
        )


def given(options: Any) -> dict[str, Any]:
    """Returns the options that are set. None stands for a module's own default."""
    return {name: value for name, value in (options or {}).items() if value is not None}
