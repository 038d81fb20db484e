"""DeepLabv3+'s decoder (Chen et al. 2018, arXiv 1802.02611, figure 2)."""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.layers import ConvNorm
from dense_jax.models.segmenter import Decoder, Pyramid


class DeepLabV3Plus(Decoder):
    """Applies ASPP to the deepest features, then fuses finer features while upsampling.

    ASPP and a separable 3x3 convolution process the deepest features. Then, for each stride in
    `skips`, from deep to fine: The result is upsampled. A 1x1 convolution reduces the channels of
    the encoder's features. Both are concatenated, and another separable 3x3 convolution fuses them.
    Finally, the scores are upsampled to stride 1. All upsampling uses `upsample`. With skips=(),
    nothing is concatenated, as in DeepLabv3.

    decoder_channels: The number of channels. The 1x1 convolutions of `skips` output 3/16 of this
      number, such as 48 for 256 (section 4.1).
    atrous_rates: The dilations of ASPP. If None, the dilations are 96, 192 and 288 input pixels,
      which is (6, 12, 18) at stride 16 and (12, 24, 36) at stride 8, as in DeepLabv3.
    """

    norm: str = "batch"
    decoder_channels: int = 256
    atrous_rates: Sequence[int] | None = None

    default_skips: ClassVar[Sequence[int] | None] = (4,)

    @nn.compact
    def __call__(self, pyramid: Pyramid, *, train: bool) -> tuple[Array, dict[int, Array]]:
        conv = functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype)
        width = self.decoder_channels
        stride, *skips = self.fused_strides(pyramid)
        rates = self.atrous_rates
        if rates is None:
            rates = [max(1, pixels // stride) for pixels in (96, 192, 288)]
        x = ASPP(width, rates, conv, name="aspp")(pyramid.features[stride], train=train)
        x = SeparableConv(width, conv, name="separable")(x, train=train)
        for below in skips:
            x = self.enlarge(x, stride, below, f"up{below}")
            stride = below
            skip = conv(max(1, 3 * width // 16), 1, name=f"skip{stride}")
            x = jnp.concatenate([x, skip(pyramid.features[stride], train=train)], axis=-1)
            x = SeparableConv(width, conv, name=f"separable{stride}")(x, train=train)
        return self.classify(x, stride), {}


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al. 2017, arXiv 1706.05587, section 3.3).

    Concatenates a 1x1 convolution, a dilated separable 3x3 convolution for each rate and the mean
    of the feature map, then reduces the result to `features` channels.
    """

    features: int
    rates: Sequence[int]
    conv: Callable[..., ConvNorm]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w f"]:
        branches = [self.conv(self.features, 1, name="point")(x, train=train)]
        for i, rate in enumerate(self.rates, 1):
            conv = SeparableConv(self.features, self.conv, rate, name=f"atrous{i}")
            branches.append(conv(x, train=train))
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        mean = self.conv(self.features, 1, name="mean")(mean, train=train)
        branches.append(jnp.broadcast_to(mean, branches[0].shape))
        x = jnp.concatenate(branches, axis=-1)
        return self.conv(self.features, 1, name="project")(x, train=train)


class SeparableConv(nn.Module):
    """A 3x3 convolution of each channel, then a 1x1 convolution, a norm and a ReLU (section 3.1).

    dilation: The distance between adjacent taps of the 3x3 kernel, in pixels.
    """

    features: int
    conv: Callable[..., ConvNorm]
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w f"]:
        x = nn.Conv(
            x.shape[-1],
            (3, 3),
            kernel_dilation=self.dilation,
            feature_group_count=x.shape[-1],
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),
            dtype=x.dtype,
            name="depthwise",
        )(x)
        return self.conv(self.features, 1, name="pointwise")(x, train=train)
