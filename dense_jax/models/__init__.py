"""Models for dense prediction, each built from an encoder, a decoder, an upsampler and skips.

`build(config.model, num_classes)` returns a Module, called as `model.apply(variables, image,
train=...)`. The image is a normalized float array, [b, h, w, c], with any h and w >= 1. The
result is float32 logits, [b, h, w, num_classes], at the image's resolution.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
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
CHOICES: dict[str, Iterable[Any]] = {
    "name": DECODERS,
    "encoder": ENCODERS,
    "upsampling": UPSAMPLERS,
    "fusion": FUSIONS,
    "norm": NORMS,
    "dtype": DTYPES,
    "padding": PADDINGS,
    "decoder_conv": CONVS,
    "output_stride": (8, 16, 32),
}
# Fields of config.model that are not options of an encoder or a decoder.
_OTHERS = {"name", "encoder", "upsampling", "upsampling_options", "skips"}
_OTHERS |= {"normalization", "pretrained", "initialize_from", "freeze_encoder", "auxiliary"}
# Options that every config sets, even if its encoder and decoder do not have them.
_ALWAYS_SET = {"widths", "fusion", "norm", "dtype"}


def build(config: Any, num_classes: int) -> Segmenter:
    """Builds the model that the fields of `config.model` describe.

    Raises ValueError if a field is invalid or fields are incompatible.
    """
    set_fields = _set(config)
    for field, valid in CHOICES.items():
        if field in set_fields:
            _check(f"model.{field}", config[field], valid)
    widths = tuple(config.widths)
    if not widths or not all(isinstance(width, int) and width > 0 for width in widths):
        raise ValueError(f"model.widths={widths} must be one or more positive numbers of channels")
    if set_fields.get("kernel_size", 1) % 2 == 0:
        raise ValueError(f"model.kernel_size={config.kernel_size} must be odd")
    make_encoder, make_decoder = ENCODERS[config.encoder].make, DECODERS[config.name]
    options = {name: value for name, value in set_fields.items() if name not in _OTHERS}
    for name in options.keys() - _ALWAYS_SET - _fields(make_encoder) - _fields(make_decoder):
        raise ValueError(
            f"model.{name}={options[name]!r}: neither {config.name!r} nor {config.encoder!r} has it; "
            "leave it unset"
        )
    options |= {"dtype": jnp.dtype(config.dtype), "widths": widths}
    encoder = _make(make_encoder, {**make_decoder.encoder_options} | options)
    if config.freeze_encoder and encoder.dropout:
        raise ValueError(
            f"model.dropout={encoder.dropout} would do nothing: with model.freeze_encoder the "
            "encoder is as in evaluation; set model.dropout=0"
        )
    below_deepest = encoder.spec.strides[:-1]
    usual = make_decoder.default_skips
    usual = below_deepest if usual is None else tuple(s for s in below_deepest if s in usual)
    skips = _strides("model.skips", config.skips, below_deepest, usual)
    own = {"num_classes": num_classes, "skips": skips, "upsample": _upsampler(config)}
    decoder = _make(make_decoder, options | own)
    decoder.check(encoder.spec)
    path, auxiliary = "model.auxiliary.strides", config.auxiliary
    heads = _strides(path, auxiliary.strides, encoder.spec.strides)
    if len(heads) != len(auxiliary.weights or ()):
        raise ValueError(
            f"model.auxiliary.weights={auxiliary.weights} must be one for each of {path}={heads}"
        )
    return Segmenter(encoder, decoder, config.freeze_encoder, heads)


def _strides(
    path: str, strides: Sequence[int] | None, valid: Sequence[int], default: Sequence[int] = ()
) -> tuple[int, ...]:
    """Returns `strides`, or `default` if it is None. Raises ValueError for invalid strides."""
    if strides is None:
        return tuple(default)
    for stride in strides:
        _check(path, stride, valid)
    if len(set(strides)) < len(strides):
        raise ValueError(f"{path}={tuple(strides)} has a stride twice")
    return tuple(strides)


def _upsampler(config: Any) -> Callable[..., Upsampler]:
    """Returns a factory for upsamplers with `config.upsampling_options` and `config.dtype`."""
    make, options = UPSAMPLERS[config.upsampling], _set(config.upsampling_options)
    others = {"features", "factor", "dtype", "enlarge", "conv_general_dilated", "parent", "name"}
    valid = sorted(_fields(make) - others)
    for option in options:
        _check(f"upsampling_options of {config.upsampling!r}", option, valid)
    upsample = functools.partial(make, dtype=jnp.dtype(config.dtype), **options)
    upsample(features=1)  # raises if an option has an invalid value
    return upsample


def _fields(part: Callable) -> set[str]:
    parameters = inspect.signature(part).parameters.values()
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}


def _make(part: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Makes an encoder or a decoder by calling `part` with only the options that it accepts."""
    return part(**{name: value for name, value in options.items() if name in _fields(part)})


def _check(what: str, value: Any, valid: Iterable[Any]) -> None:
    if value not in valid:
        names = [str(name) for name in valid]
        raise ValueError(
            f"{what}: {value!r} is not one of {', '.join(map(repr, valid)) or 'none'}"
            f"{suggestion(str(value), names)}"
        )


def _set(options: Any) -> dict[str, Any]:
    """Returns the options whose value is not None. None stands for an option's default value."""
    return {name: value for name, value in options.items() if value is not None}
