"""U-Net's expanding path (Ronneberger et al. 2015, arXiv 1505.04597, figure 1)."""

import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dense_jax.models.layers import ConvBlock, ConvNorm, Project, center
from dense_jax.models.segmenter import Decoder, Pyramid, Spec, Upsampler
from dense_jax.models.upsampling.fixed import bilinear

FUSIONS = ("concat", "add", "gated")
CONVS = ("full", "depthwise", "none")


class UNet(Decoder, kw_only=True):
    """Upsamples the deepest features by 2 per level, to stride 1, and fuses encoder features.

    widths: The numbers of channels at strides 1, 2, 4 and so on. The last number applies to all
      larger strides.
    fusion: "concat", "add" or "gated". If "add", a skip is first projected to the level's number of
      channels. If "gated", an AttentionGate weights the skip before it is concatenated.
    decoder_conv: "full", "depthwise" (one filter per channel, as in SegNet's SingleChannelDecoder)
      or "none" (only upsampling and fusion, as in FCN-Basic-NoDimReduction).
    decoder_relu: Whether ReLUs follow the convolutions. In SegNet-Basic, none do.
    """

    widths: Sequence[int]
    fusion: str = "concat"
    norm: str = "batch"
    convs_per_level: int = 2
    kernel_size: int = 3
    padding: str = "SAME"
    decoder_conv: str = "full"
    decoder_relu: bool = True
    remat: bool = False

    has_switches: ClassVar[bool] = True

    @property
    def block_loss(self) -> int:
        is_unpadded = self.padding == "VALID" and self.decoder_conv != "none"
        return self.convs_per_level * (self.kernel_size - 1) if is_unpadded else 0

    @nn.nowrap
    def check(self, spec: Spec) -> None:
        super().check(spec)
        if self.decoder_conv == "depthwise" and self.skips and self.fusion != "add":
            raise ValueError(
                "model.decoder_conv='depthwise' keeps the number of channels, which model.fusion="
                f"{self.fusion!r} changes: use 'add'"
            )

    @nn.compact
    def __call__(self, pyramid: Pyramid, *, train: bool) -> tuple[Array, dict[int, Array]]:
        conv = functools.partial(
            ConvNorm,
            kernel_size=self.kernel_size,
            padding=self.padding,
            norm=self.norm,
            activation=jax.nn.relu if self.decoder_relu else None,
            depthwise=self.decoder_conv == "depthwise",
            dtype=self.dtype,
        )
        make_level = nn.remat(Level, static_argnums=(4,)) if self.remat else Level
        stride = max(pyramid.features)
        x, levels = pyramid.features[stride], {}
        while stride > 1:
            stride //= 2
            width = self.widths[min(stride.bit_length(), len(self.widths)) - 1]
            project = Project(width, self.dtype, name=f"skip{stride}")
            gate = AttentionGate(self.dtype, name=f"gate{stride}")
            block = ConvBlock(width, self.convs_per_level, conv, name=f"stride{stride}")
            level = make_level(
                up=self.upsample(features=width, name=f"up{stride}"),
                gate=gate if self.fusion == "gated" else None,
                project=project if self.fusion == "add" else None,
                block=block if self.decoder_conv != "none" else None,
            )
            skip = pyramid.features[stride] if stride in self.skips else None
            x = levels[stride] = level(x, skip, pyramid.switches.get(stride), train)
        return nn.Conv(self.num_classes, (1, 1), dtype=self.dtype, name="head")(x), levels


class Level(nn.Module):
    """One level of the decoder: upsampling, fusion with a skip, and convolutions.

    The skip is center-cropped to the size of x, which unpadded convolutions may have trimmed. A
    Level does not appear in parameter paths; see `Stage`.

    gate: A layer that weights the skip, or None. It is called as gate(skip, x), where x has not yet
      been upsampled.
    project: A layer that projects the skip before it is added to x. If None, the skip is
      concatenated with x instead.
    block: The convolutions, or None.
    """

    up: Upsampler
    gate: nn.Module | None
    project: nn.Module | None
    block: nn.Module | None

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        skip: Float[Array, "b _ _ d"] | None,
        switches: Int[Array, "b _ _ e"] | None,
        train: bool,
    ) -> Float[Array, "b H W f"]:
        coarse = x
        x = self.up(x, None if switches is None else center(switches, x.shape[1:3]))
        if skip is not None:
            skip = center(skip, x.shape[1:3])
            if self.gate is not None:
                skip = self.gate(skip, coarse)
            if self.project is None:
                x = jnp.concatenate([skip, x], axis=-1)
            else:
                x = x + self.project(skip)
        return x if self.block is None else self.block(x, train=train)


class AttentionGate(nn.Module):
    """Weights each pixel of a skip by its relevance (Attention U-Net, arXiv 1804.03999, figure 2).

    `coarse` holds the decoder's features before upsampling. At this resolution, the weights are
    sigmoid(psi(relu(theta(skip) + phi(coarse)))). They are interpolated bilinearly to the
    resolution of the skip. theta is a 2x2 convolution with stride 2. phi and psi are 1x1
    convolutions. As in the authors' code, theta and phi have half as many output channels as the
    skip. psi's bias starts at 3, so that the gate passes most of the skip at first.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, skip: Float[Array, "b H W c"], coarse: Float[Array, "b h w d"]
    ) -> Float[Array, "b H W c"]:
        conv = functools.partial(
            nn.Conv,
            padding="VALID",
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
        )
        channels = max(1, skip.shape[-1] // 2)
        hidden = conv(channels, (2, 2), strides=2, use_bias=False, name="theta")(skip)
        hidden = jax.nn.relu(hidden + conv(channels, (1, 1), name="phi")(coarse))
        score = conv(1, (1, 1), bias_init=nn.initializers.constant(3.0), name="psi")(hidden)
        return skip * bilinear(jax.nn.sigmoid(score), 2)
