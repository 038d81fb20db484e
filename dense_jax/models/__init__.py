"""Models for dense prediction: encoder x decoder x upsampling x skips, all config fields.

`build(config.model, num_classes)` gives a Module called `model.apply(variables, image, train=...)`:
image float [b, h, w, 1 or 3] of any height and width >= 1, already normalised; float32 logits
[b, h, w, num_classes] at the input's resolution.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.encoders import ENCODERS
from dense_jax.models.fcn import FCN
from dense_jax.models.layers import NORMS
from dense_jax.models.unet import FUSIONS, UNet
from dense_jax.models.upsampling import UPSAMPLERS

MODELS: dict[str, Callable[..., nn.Module]] = {"fcn": FCN, "unet": UNet}
DTYPES = ("float32", "bfloat16")


class Segmenter(nn.Module):
    """An encoder and a decoder, for images of any size."""

    encoder: nn.Module
    decoder: nn.Module

    def __call__(
        self, image: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h w num_classes"]:
        _, h, w, _ = image.shape
        stride = self.encoder.strides[-1]
        padding = ((0, 0), (0, -h % stride), (0, -w % stride), (0, 0))
        pyramid = self.encoder(jnp.pad(image, padding, mode="edge"), train=train)
        return self.decoder(pyramid, train=train)[:, :h, :w].astype(jnp.float32)


def build(config: Any, num_classes: int) -> nn.Module:
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
    if config.pretrained:
        raise ValueError(
            f"model.pretrained={config.pretrained!r}: encoder {config.encoder!r} has no published "
            "weights; leave model.pretrained unset"
        )
    widths = tuple(config.widths)
    if not widths or min(widths) < 1:
        raise ValueError(f"model.widths={widths} must be one or more positive numbers of channels")
    dtype = jnp.dtype(config.dtype)
    options = given(config.upsampling_options)
    upsampler = UPSAMPLERS[config.upsampling]
    valid = set(inspect.signature(upsampler).parameters)
    for option in options:
        valid_options = sorted(valid - {"features", "factor", "dtype", "parent", "name"})
        _check(f"upsampling_options of {config.upsampling!r}", option, valid_options)

    encoder = ENCODERS[config.encoder](widths=widths, norm=config.norm, dtype=dtype)
    below_deepest = encoder.strides[:-1]
    skips = below_deepest if config.skips is None else tuple(config.skips)
    for stride in skips:
        _check("model.skips", stride, below_deepest)
    if len(set(skips)) < len(skips):
        raise ValueError(f"model.skips={skips} has a stride twice")
    shared = {
        "num_classes": num_classes,
        "upsample": functools.partial(upsampler, dtype=dtype, **options),
        "skips": skips,
        "dtype": dtype,
    }
    if config.name == "unet":
        shared |= {"widths": widths, "fusion": config.fusion, "norm": config.norm}
    return Segmenter(encoder, MODELS[config.name](**shared))


def _check(what: str, value: Any, valid: Iterable[Any]) -> None:
    if value not in valid:
        raise ValueError(f"{what}: {value!r} is not one of {', '.join(map(repr, valid)) or 'none'}")


def given(options: Any) -> dict[str, Any]:
    """The options that were set; None stands for a module's own default."""
    return {name: value for name, value in (options or {}).items() if value is not None}
