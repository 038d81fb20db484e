"""SegFormer's decoder (Xie et al. 2021, arXiv 2105.15203, section 3.2)."""

from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from dense_jax.models.layers import ConvNorm
from dense_jax.models.segmenter import Decoder, Pyramid


class SegFormer(Decoder):
    """Mixes the channels of each feature map, and fuses all maps at the finest fused stride.

    A linear layer (a 1x1 convolution) gives every feature map the same number of channels. The maps
    are upsampled to the finest fused stride, each in a single step, and concatenated. Another
    linear layer, with a norm and a ReLU, fuses them. The scores are upsampled to stride 1.
    `upsample` does all the upsampling.

    decoder_channels: The number of channels of every map.
    """

    norm: str = "batch"
    decoder_channels: int = 256

    default_skips: ClassVar[Sequence[int] | None] = (4, 8, 16)

    @nn.compact
    def __call__(self, pyramid: Pyramid, *, train: bool) -> tuple[Array, dict[int, Array]]:
        strides, maps = self.fused_strides(pyramid), []
        for stride in strides:
            linear = nn.Conv(
                self.decoder_channels, (1, 1), dtype=self.dtype, name=f"linear{stride}"
            )
            x = linear(pyramid.features[stride])
            maps.append(self.enlarge(x, stride, strides[-1], f"merge{stride}"))
        fuse = ConvNorm(self.decoder_channels, 1, norm=self.norm, dtype=self.dtype, name="fuse")
        x = fuse(jnp.concatenate(maps, axis=-1), train=train)
        return self.classify(x, strides[-1]), {}
