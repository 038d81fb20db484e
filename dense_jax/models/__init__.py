"""Models for dense prediction: encoder x decoder x upsampling x skips, all config fields.

`build(config.model, num_classes)` gives a Module called `model.apply(variables, image, train=...)`:
image float [b, h, w, 1 or 3] of any height and width >= 1, already normalized; float32 logits
[b, h, w, num_classes] at the input's resolution.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.decoders import DECODERS as MODELS
from dense_jax.models.decoders.unet import FUSIONS
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.layers import CONVS, NORMS, PADDINGS, mirrored
from dense_jax.models.upsampling import UPSAMPLERS
from dense_jax.spelling import suggestion

DTYPES = ("float32", "bfloat16")
# Fields of config.model that only some encoders or decoders have, and what they may be. Unset: the
# encoder's or decoder's own default.
OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "width_multiplier": ("positive", lambda value: 0 < value < math.inf),
    "dropout": ("from 0 to below 1", lambda value: 0 <= value < 1),
    "remat": ("True or False", lambda value: isinstance(value, bool)),
    "bottleneck": ("True or False", lambda value: isinstance(value, bool)),
    "convs_per_level": ("at least 1", lambda value: value >= 1),
    "kernel_size": ("odd and positive", lambda value: value > 0 and value % 2 == 1),
    "padding": ("'SAME' or 'VALID'", lambda value: value in PADDINGS),
    "decoder_conv": (" or ".join(map(repr, CONVS)), lambda value: value in CONVS),
    "decoder_relu": ("True or False", lambda value: isinstance(value, bool)),
    "gradual": ("True or False", lambda value: isinstance(value, bool)),
    "zero_init": ("True or False", lambda value: isinstance(value, bool)),
    "score_scales": (
        "numbers",
        lambda value: all(isinstance(x, float | int) and math.isfinite(x) for x in value),
    ),
}


class Segmenter(nn.Module):
    """An encoder and a decoder, for images of any size.

    What the network needs beyond the image is mirrored: rows and columns up to a multiple of the
    deepest stride, and with unpadded convolutions the `margin` that they eat. Upsampling that looks
    beyond a pixel's own cell (bilinear, pixel_shuffle, resize_conv, larger kernels) still pads by
    that: only with the others is a tile's middle exactly what the whole image would give.

    freeze_encoder: the encoder is as in evaluation, and gets no gradient.
    block_loss, bottom_loss: pixels of height and width that each block of the two paths, and the
      one between them, loses to unpadded convolutions.
    has_context: whether the outer `margin` pixels of an image are context, for which no logits
      are returned.
    """

    encoder: nn.Module
    decoder: nn.Module
    freeze_encoder: bool = False
    block_loss: int = 0
    bottom_loss: int = 0
    has_context: bool = False

    @property
    def margin(self) -> int:
        """Pixels that unpadded convolutions take off every side of an image; 0 with padding."""
        stride = self.encoder.strides[-1]
        return self.block_loss * (stride - 1) + self.bottom_loss * stride // 2

    def __call__(
        self, image: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b H W num_classes"]:
        stride = self.encoder.strides[-1]
        before, size = self.margin, image.shape[1:3]
        if self.has_context:
            before, size = 0, tuple(n - 2 * self.margin for n in size)
        loss = self.block_loss * (stride - 1)
        lengths = [2 * self.margin - loss - -(n + loss) // stride * stride for n in size]
        pyramid = self.encoder(
            mirrored(image, before, lengths), train=train and not self.freeze_encoder
        )
        if self.freeze_encoder:
            pyramid = jax.lax.stop_gradient(pyramid)
        logits = self.decoder(pyramid, train=train)
        return logits[:, : size[0], : size[1]].astype(jnp.float32)


def build(config: Any, num_classes: int) -> Segmenter:
    """Makes the model of `config.model`'s fields.

    Raises ValueError, naming the valid values, for a field that no model can be made of.
    """
    for field, valid in (
        ("name", MODELS),
        ("encoder", ENCODERS),
        ("upsampling", UPSAMPLERS),
        ("fusion", FUSIONS),
        ("norm", NORMS),
        ("dtype", DTYPES),
    ):
        _check(f"model.{field}", config[field], valid)
    widths = tuple(config.widths)
    if not widths or not all(isinstance(width, int) and width > 0 for width in widths):
        raise ValueError(f"model.widths={widths} must be one or more positive numbers of channels")
    make_encoder, make_decoder = ENCODERS[config.encoder], MODELS[config.name]
    options = given({name: config.get(name) for name in OPTIONS})  # older configs lack some
    for name, value in options.items():
        what, is_valid = OPTIONS[name]
        if not is_valid(value):
            raise ValueError(f"model.{name}={value!r} must be {what}")
        if not any(name in _fields(part) for part in (make_encoder, make_decoder)):
            raise ValueError(
                f"model.{name}={value!r}: neither {config.name!r} nor {config.encoder!r} has it; "
                "leave it unset"
            )
    if config.freeze_encoder and options.get("dropout"):
        raise ValueError(
            f"model.dropout={options['dropout']} would do nothing: with model.freeze_encoder the "
            "encoder is as in evaluation; set model.dropout=0"
        )
    options["dtype"] = jnp.dtype(config.dtype)
    options |= {"norm": config.norm, "widths": widths, "fusion": config.fusion}

    encoder = _make(make_encoder, options | {"fcn": config.name == "fcn"})
    below_deepest = encoder.strides[:-1]
    skips = below_deepest if config.skips is None else tuple(config.skips)
    for stride in skips:
        _check("model.skips", stride, below_deepest)
    if len(set(skips)) < len(skips):
        raise ValueError(f"model.skips={skips} has a stride twice")
    scales = options.get("score_scales")
    if scales is not None and len(scales) != len(skips):
        raise ValueError(f"model.score_scales={scales} must be one for each of model.skips={skips}")
    decoder = _make(
        make_decoder,
        options
        | {"num_classes": num_classes, "skips": skips, "upsample": _upsampler(config, encoder)},
    )
    unpadded = options.get("padding") == "VALID"
    if unpadded and (config.name, config.encoder) != ("unet", "plain"):
        raise ValueError(
            "model.padding='VALID': only 'unet' over 'plain' has unpadded convolutions, not "
            f"{config.name!r} over {config.encoder!r}"
        )
    decoder_conv = options.get("decoder_conv")
    if decoder_conv == "none" and unpadded:
        raise ValueError(
            "model.decoder_conv='none': with model.padding='VALID' both paths must lose as much"
        )
    if decoder_conv == "depthwise" and skips and config.fusion == "concat":
        raise ValueError(
            "model.decoder_conv='depthwise' keeps the number of channels, which model.fusion="
            "'concat' changes: use 'add'"
        )
    loss = decoder.convs_per_level * (decoder.kernel_size - 1) if unpadded else 0
    return Segmenter(
        encoder,
        decoder,
        freeze_encoder=config.freeze_encoder,
        block_loss=loss,
        bottom_loss=loss if unpadded and encoder.bottleneck else 0,
    )


def _upsampler(config: Any, encoder: nn.Module) -> Callable[..., nn.Module]:
    """Makes upsamplers with `config.upsampling_options`, called with `features` and `factor`."""
    method = config.upsampling
    options = given(config.upsampling_options)
    not_options = {"features", "factor", "dtype", "parent", "name"}
    for option in options:
        valid = sorted(_fields(UPSAMPLERS[method]) - not_options)
        _check(f"upsampling_options of {method!r}", option, valid)
    if method == "max_unpool":
        instead = "use bed_of_nails or transposed_conv, or 'unet' over 'plain' or 'vgg16'"
        if config.name != "unet":
            raise ValueError(
                "model.upsampling='max_unpool': the score maps of 'fcn' were never pooled, so that "
                f"there are no switches for them: {instead}"
            )
        unpooled = {2**level for level in range(encoder.strides[-1].bit_length() - 1)}
        without = sorted(unpooled - set(encoder.switch_strides))
        if without:
            raise ValueError(
                f"model.upsampling='max_unpool': encoder {config.encoder!r} has no 2x2 max-pool, "
                f"and so no switches, at the strides {without}: {instead}"
            )
    upsample = functools.partial(UPSAMPLERS[method], dtype=jnp.dtype(config.dtype), **options)
    upsample(features=1)  # says now what is wrong with the options' values
    return upsample


def _fields(part: Callable) -> set[str]:
    return set(inspect.signature(part).parameters)


def _make(part: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
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
    """The options that were set; None stands for a module's own default."""
    return {name: value for name, value in (options or {}).items() if value is not None}
