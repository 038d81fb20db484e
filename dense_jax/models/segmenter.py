"""A network for dense prediction: an encoder, a decoder, and what one may rely on from the other.

    image -> Encoder -> Pyramid -> Decoder, which enlarges with Upsamplers -> logits

Encoders and decoders know each other only through this file.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dense_jax.models.layers import ConvNorm, Stage, mirrored
from dense_jax.models.upsampling import Upsampler


@struct.dataclass
class Pyramid:
    """The feature maps that an encoder hands to a decoder, keyed by stride in input pixels.

    features[s]: [b, h/s, w/s, c_s]; smaller after unpadded ("VALID") convolutions.
    switches[s]: the pixel of each 2x2 window of features[s] that won the max-pool behind it, as
      2 * row + column, [b, h/2s, w/2s, c_s]; only where the encoder max-pools 2x2.
    """

    features: Mapping[int, Array]
    switches: Mapping[int, Array] = struct.field(default_factory=dict)


class Spec(NamedTuple):
    """The properties of an encoder that are known before it is run.

    strides: those of its features, in increasing order.
    switch_strides: those of its switches.
    block_loss: rows and columns that each block loses to unpadded convolutions; the decoder's
      blocks must lose as many.
    bottom_loss: the same for the deepest block; 0 if the deepest features are a max-pool's.
    """

    strides: tuple[int, ...]
    switch_strides: tuple[int, ...] = ()
    block_loss: int = 0
    bottom_loss: int = 0


class Encoder(nn.Module):
    """The base of all encoders, called as `encoder(image, train=...)`; it returns a Pyramid.

    The image is [b, h, w, c], with h and w multiples of the deepest stride.

    norm: "batch" | "group" | "none".
    dropout: the probability that a value of the deepest features is dropped; with a classifier,
      after fc6 and after fc7.
    remat: whether the activations inside a stage are computed again for the gradient, not kept.
    dtype: of the computation.

    Encoders with published widths have a `width_multiplier` of all channels.
    """

    norm: str = "batch"
    dropout: float = 0.0
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def spec(self) -> Spec:
        raise NotImplementedError

    @property
    def conv(self) -> Callable[..., ConvNorm]:
        """Makes the encoder's convolutions, called with the other fields of a ConvNorm."""
        return functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype)

    @nn.nowrap
    def stage(self, *layers: nn.Module) -> nn.Module:
        """Returns the layers one after the other, as stage(x, train)."""
        return (nn.remat(Stage, static_argnums=(2,)) if self.remat else Stage)(layers)

    def __call__(self, image: Array, *, train: bool) -> Pyramid:
        raise NotImplementedError


class Decoder(nn.Module):
    """The base of all decoders, called as `decoder(pyramid, train=...)`; it returns logits.

    The logits are [b, h, w, num_classes] at stride 1.

    upsample: makes an Upsampler, called with its fields.
    skips: the strides whose features are fused on the way up, besides the deepest ones.
    dtype: of the computation.

    A class may declare:
    encoder_options: the options that it asks of an encoder, if the encoder has them.
    has_switches: whether it enlarges feature maps from strides 2s to s, with the switches at s.
    """

    num_classes: int
    upsample: Callable[..., Upsampler]
    skips: Sequence[int]
    dtype: DTypeLike = jnp.float32

    encoder_options: ClassVar[Mapping[str, Any]] = {}
    has_switches: ClassVar[bool] = False

    @property
    def block_loss(self) -> int:
        """Rows and columns that each block loses to unpadded convolutions."""
        return 0

    @nn.nowrap
    def check(self, spec: Spec) -> None:
        """Raises ValueError, with the way out, for an encoder that this decoder does not fit."""
        if self.block_loss != spec.block_loss:
            raise ValueError(
                f"model.padding='VALID': a block of the encoder loses {spec.block_loss} pixels and "
                f"one of the decoder {self.block_loss}. Both paths must lose as much: use 'SAME', or "
                "an encoder and a decoder that both have unpadded convolutions"
            )
        if not self.upsample(features=1, parent=None).needs_switches:
            return
        unpooled = {2**level for level in range(spec.strides[-1].bit_length() - 1)}
        missing = sorted(unpooled - set(spec.switch_strides))
        if missing or not self.has_switches:
            reason = (
                f"the encoder has no 2x2 max-pool, and so no switches, at the strides {missing}"
            )
            if not self.has_switches:
                reason = (
                    "the decoder enlarges maps that were never pooled, so they have no switches"
                )
            raise ValueError(
                f"model.upsampling='max_unpool': {reason}. Use bed_of_nails or transposed_conv, or "
                "parts that go together by `python -m dense_jax.summary --crossings`"
            )

    def __call__(self, pyramid: Pyramid, *, train: bool) -> Array:
        raise NotImplementedError


class Segmenter(nn.Module):
    """An encoder and a decoder, for images of any size.

    The image is extended by reflection to a multiple of the deepest stride and, with unpadded
    convolutions, by `context` pixels on every side. Upsampling that reads neighboring cells (bilinear,
    pixel_shuffle, resize_conv, larger kernels) still pads feature maps at their border. Only with the
    other methods is the middle of a tile exactly what the whole image gives.

    freeze_encoder: whether the encoder runs as in evaluation and gets no gradient.
    has_context: whether the image brings its context: its outer `context` pixels get no logits.
    """

    encoder: Encoder
    decoder: Decoder
    freeze_encoder: bool = False
    has_context: bool = False

    @property
    def context(self) -> int:
        """Pixels that unpadded convolutions take off every side of an image; 0 with padding."""
        spec = self.encoder.spec
        stride = spec.strides[-1]
        return spec.block_loss * (stride - 1) + spec.bottom_loss * stride // 2

    def __call__(
        self, image: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b H W num_classes"]:
        stride = self.encoder.spec.strides[-1]
        before, size = self.context, image.shape[1:3]
        if self.has_context:
            before, size = 0, tuple(n - 2 * self.context for n in size)
        loss = self.encoder.spec.block_loss * (stride - 1)
        lengths = [2 * self.context - loss - -(n + loss) // stride * stride for n in size]
        train_encoder = train and not self.freeze_encoder
        pyramid = self.encoder(mirrored(image, before, lengths), train=train_encoder)
        if self.freeze_encoder:
            pyramid = jax.lax.stop_gradient(pyramid)
        logits = self.decoder(pyramid, train=train)
        return logits[:, : size[0], : size[1]].astype(jnp.float32)
