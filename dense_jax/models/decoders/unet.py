"""U-Net's expanding path (Ronneberger et al. 2015, arXiv 1505.04597, figure 1)."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dense_jax.devices.cpu import Conv
from dense_jax.models.layers import ConvBlock, Project, Pyramid, center, run

FUSIONS = ("concat", "add")


class UNet(nn.Module):
    """Doubles the deepest features up to stride 1 and fuses the encoder's on the way.

    upsample: makes an upsampler, called with `features`.
    widths: channels at strides 1, 2, 4, ...; the last one also at all further strides.
    skips: the strides whose encoder features are fused: their middle, where unpadded
      convolutions have left less here than there.
    fusion: "concat", or "add", for which a skip is projected to x's channels if it has others.
    decoder_conv: "full", "depthwise" (one filter per channel) or "none": then features are upsampled
      and fused alone (SegNet's SingleChannelDecoder and FCN-Basic-NoDimReduction).
    decoder_relu: False leaves out the ReLU behind the convolutions (SegNet-Basic).
    """

    num_classes: int
    upsample: Callable[..., nn.Module]
    widths: Sequence[int]
    skips: Sequence[int]
    fusion: str = "concat"
    norm: str = "batch"
    convs_per_level: int = 2
    kernel_size: int = 3
    padding: str = "SAME"
    decoder_conv: str = "full"
    decoder_relu: bool = True
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pyramid: Pyramid, *, train: bool) -> Float[Array, "b h w num_classes"]:
        stride = max(pyramid.features)
        x = pyramid.features[stride]
        while stride > 1:
            stride //= 2

            def stage(module, x, stride=stride):
                width = self.widths[min(stride.bit_length(), len(self.widths)) - 1]
                switches = pyramid.switches.get(stride)
                if switches is not None:
                    switches = center(switches, x.shape[1:3])
                x = self.upsample(features=width, name=f"up{stride}")(x, switches)
                if stride in self.skips:
                    skip = center(pyramid.features[stride], x.shape[1:3])
                    if self.fusion == "concat":
                        x = jnp.concatenate([skip, x], axis=-1)
                    else:
                        x = x + Project(width, self.dtype, name=f"skip{stride}")(skip)
                if self.decoder_conv == "none":
                    return x
                return ConvBlock(
                    width,
                    self.convs_per_level,
                    self.kernel_size,
                    self.padding,
                    self.norm,
                    self.decoder_relu,
                    self.decoder_conv == "depthwise",
                    self.dtype,
                    name=f"stride{stride}",
                )(x, train=train)

            x = run(stage, self, x, remat=self.remat)
        return Conv(self.num_classes, (1, 1), dtype=self.dtype, name="head")(x)
