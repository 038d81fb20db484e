"""A segmentation network, and the interface between its encoder and its decoder.

    image -> Encoder -> Pyramid -> Decoder, which upsamples with Upsamplers -> logits

Encoders and decoders depend on each other only through this file.
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

from dense_jax.models.layers import ConvNorm, Stage, center, mirrored, resize


@struct.dataclass
class Pyramid:
    """The feature maps that an encoder passes to a decoder, keyed by stride in input pixels.

    features[s]: The feature map at stride s, [b, h/s, w/s, c_s]. Unpadded ("VALID") convolutions
      trim some rows and columns.
    switches[s]: The argmax indices of the 2x2 max-pool of features[s], [b, h/2s, w/2s, c_s]. An
      index is 2 * row + column within a window. Strides without a 2x2 max-pool are absent.
    """

    features: Mapping[int, Array]
    switches: Mapping[int, Array] = struct.field(default_factory=dict)


class Spec(NamedTuple):
    """The properties of an encoder that are known before it runs.

    strides: The strides of the feature maps, in increasing order.
    switch_strides: The strides that have switches (max-pool argmax indices).
    block_loss: The number of rows and columns that unpadded convolutions trim in each block.
      Decoder blocks must trim the same number.
    bottom_loss: The number of rows and columns trimmed in the deepest block. The number is 0 if the
      deepest feature map is the output of a max-pool.
    """

    strides: tuple[int, ...]
    switch_strides: tuple[int, ...] = ()
    block_loss: int = 0
    bottom_loss: int = 0


class Encoder(nn.Module):
    """The base class of encoders. `encoder(image, train=...)` returns a Pyramid.

    The image is [b, h, w, c]. Both h and w must be multiples of the deepest stride.

    norm: The kind of normalization, "batch", "group" or "none".
    dropout: The dropout rate for the deepest features or, with a classifier, after fc6 and fc7.
    remat: Whether the backward pass recomputes activations inside a stage instead of storing them.
    dtype: The dtype of the computation.

    Encoders with published widths have a `width_multiplier` that scales all channel counts.
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
        """A factory for ConvNorms with this encoder's `norm` and `dtype`."""
        return functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype)

    @nn.nowrap
    def stage(self, *layers: nn.Module) -> nn.Module:
        """Returns a module, called as stage(x, train), that applies the layers in sequence."""
        return (nn.remat(Stage, static_argnums=(2,)) if self.remat else Stage)(layers)

    def __call__(self, image: Array, *, train: bool) -> Pyramid:
        raise NotImplementedError


class Upsampler(nn.Module):
    """The base class of upsampling methods, called as `up(x, switches=None)`.

    x, [b, h, w, c], becomes [b, factor * h, factor * w, features]. `switches` are the argmax
    indices of the matching max-pool in the encoder (see `Pyramid`), or None. Methods that
    cannot change the number of channels include 1x1 convolutions for this purpose.

    needs_switches: Whether the method requires switches. Subclasses set this class variable.
    """

    features: int
    factor: int = 2
    dtype: DTypeLike = jnp.float32

    needs_switches: ClassVar[bool] = False

    def __call__(self, x: Array, switches: Array | None = None) -> Array:
        raise NotImplementedError


class Decoder(nn.Module):
    """The base class of decoders. `decoder(pyramid, train=...)` returns (logits, levels).

    The logits are [b, h, w, num_classes] at stride 1. `levels`, {stride: feature map}, holds the
    decoder's own maps that auxiliary heads may classify (see `AuxiliaryHeads`). It may be empty.

    upsample: The factory for Upsamplers, called with the fields of an Upsampler.
    skips: The strides of the feature maps to fuse during upsampling, without the deepest stride.
    dtype: The dtype of the computation.

    A subclass may override three class variables:
    encoder_options: The decoder's default encoder options. Encoders ignore unknown options.
    default_skips: The value of `skips` if `model.skips` is unset. Strides that the encoder lacks
      are dropped. None means all strides but the deepest.
    has_switches: Whether the decoder passes switches[s] to the Upsampler from stride 2s to s.
    """

    num_classes: int
    upsample: Callable[..., Upsampler]
    skips: Sequence[int]
    dtype: DTypeLike = jnp.float32

    encoder_options: ClassVar[Mapping[str, Any]] = {}
    default_skips: ClassVar[Sequence[int] | None] = None
    has_switches: ClassVar[bool] = False

    @property
    def block_loss(self) -> int:
        """The number of rows and columns that unpadded convolutions trim in each block."""
        return 0

    @nn.nowrap
    def check(self, spec: Spec) -> None:
        """Raises ValueError, with a suggested fix, if this decoder does not fit the encoder."""
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

    @nn.nowrap
    def fused_strides(self, pyramid: Pyramid) -> list[int]:
        """Returns the deepest stride and the strides of `skips`, in decreasing order."""
        return sorted({max(pyramid.features), *self.skips}, reverse=True)

    @nn.nowrap
    def enlarge(self, x: Array, stride: int, target: int, name: str) -> Array:
        """Upsamples a feature map from `stride` to `target`, with the same number of channels."""
        if stride == target:
            return x
        return self.upsample(features=x.shape[-1], factor=stride // target, name=name)(x)

    @nn.nowrap
    def classify(self, x: Array, stride: int) -> Array:
        """Returns the logits for features at `stride`: a 1x1 convolution, then upsampling."""
        scores = nn.Conv(self.num_classes, (1, 1), dtype=self.dtype, name="head")(x)
        return self.enlarge(scores, stride, 1, "up1")

    def __call__(self, pyramid: Pyramid, *, train: bool) -> tuple[Array, Mapping[int, Array]]:
        raise NotImplementedError


class AuxiliaryHeads(nn.Module):
    """Classifies intermediate feature maps, only for the training loss. Returns {stride: logits}.

    If the decoder has a level at a stride, a 1x1 convolution classifies this level, as in nnU-Net's
    deep supervision. Otherwise an FCN head classifies the encoder's features: a 3x3 convolution to
    a quarter of the channels, a norm, a ReLU, dropout of 0.1 and a 1x1 convolution, as for PSPNet
    (arXiv 1612.01105, section 3.3) in MMSegmentation.

    The logits are interpolated bilinearly to stride 1 and center-cropped to `size`.

    conv: The factory for the ConvNorms of the FCN heads.
    """

    strides: Sequence[int]
    num_classes: int
    conv: Callable[..., ConvNorm]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Mapping[int, Array],
        levels: Mapping[int, Array],
        size: Sequence[int],
        *,
        train: bool,
    ) -> dict[int, Array]:
        logits = {}
        for stride in self.strides:
            x = levels.get(stride)
            if x is None:
                x = features[stride]
                x = self.conv(max(1, x.shape[-1] // 4), name=f"conv{stride}")(x, train=train)
                x = nn.Dropout(0.1, deterministic=not train)(x)
            head = nn.Conv(self.num_classes, (1, 1), dtype=self.dtype, name=f"head{stride}")
            logits[stride] = center(resize(head(x), [stride * n for n in x.shape[1:3]]), size)
        return logits


class Segmenter(nn.Module):
    """An encoder and a decoder for images of any size.

    The image is extended by reflection to a multiple of the deepest stride. If convolutions are
    unpadded, `context` pixels are also added on every side. Tiled prediction then gives exactly the
    logits of the whole image, unless the upsampling method reads neighboring pixels. Such a method,
    for example bilinear, pads feature maps at the border.

    In training, the logits of the auxiliary heads, {stride: logits}, are sown into the collection
    "intermediates" as `auxiliary_logits`. They have the size of the main logits, so the same labels
    apply. The heads' variables are below "auxiliary". Evaluation does not need these variables.

    freeze_encoder: Whether the encoder runs in evaluation mode and gets no gradient.
    auxiliary_strides: The strides of the auxiliary heads.
    has_context: Whether the image already includes `context` pixels on every side. If so, these
      pixels get no logits.
    """

    encoder: Encoder
    decoder: Decoder
    freeze_encoder: bool = False
    auxiliary_strides: Sequence[int] = ()
    has_context: bool = False

    @property
    def context(self) -> int:
        """The number of pixels trimmed on every side, which is 0 if convolutions are padded."""
        spec = self.encoder.spec
        stride = spec.strides[-1]
        return spec.block_loss * (stride - 1) + spec.bottom_loss * stride // 2

    @nn.compact
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
        logits, levels = self.decoder(pyramid, train=train)

        def cropped(x):
            return x[:, : size[0], : size[1]].astype(jnp.float32)

        if self.auxiliary_strides and (train or self.is_initializing()):
            useless = sorted(set(self.auxiliary_strides) - set(levels))
            if self.freeze_encoder and useless:
                raise ValueError(
                    f"model.auxiliary.strides={tuple(useless)}: with model.freeze_encoder, a head on "
                    "the encoder's features trains only itself; leave it out"
                )
            heads = AuxiliaryHeads(
                self.auxiliary_strides,
                self.decoder.num_classes,
                self.encoder.conv,
                self.encoder.dtype,
                name="auxiliary",
            )
            auxiliary = heads(pyramid.features, levels, logits.shape[1:3], train=train)
            self.sow("intermediates", "auxiliary_logits", jax.tree.map(cropped, auxiliary))
        return cropped(logits)
