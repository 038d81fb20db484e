"""A feature pyramid network (Lin et al. 2017, arXiv 1612.03144) with a segmentation head."""

import functools
import itertools
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from dense_jax.models.layers import ConvNorm
from dense_jax.models.segmenter import Decoder, Pyramid


class FPN(Decoder):
    """Adds up feature maps from deep to fine, and merges all levels at the finest fused stride.

    The top-down path upsamples each level and adds a 1x1 convolution of the encoder's features at
    the next stride (figure 3). As in segmentation_models.pytorch, it has no 3x3 convolutions. In
    the segmentation head (Kirillov et al. 2019, arXiv 1901.02446, figure 3), a 3x3 convolution
    precedes each upsampling by 2. The finest level has one 3x3 convolution and no upsampling. The
    head adds up all levels, classifies the sum, and upsamples the scores to stride 1. `upsample`
    does all the upsampling.

    decoder_channels: The number of channels of the top-down path. The head has half as many
      channels.
    """

    norm: str = "batch"
    decoder_channels: int = 256

    default_skips: ClassVar[Sequence[int] | None] = (4, 8, 16)

    @nn.compact
    def __call__(self, pyramid: Pyramid, *, train: bool) -> tuple[Array, dict[int, Array]]:
        strides = self.fused_strides(pyramid)
        finest, maps = strides[-1], {}
        for stride in strides:
            conv = nn.Conv(self.decoder_channels, (1, 1), dtype=self.dtype, name=f"lateral{stride}")
            maps[stride] = conv(pyramid.features[stride])
        for above, stride in itertools.pairwise(strides):
            maps[stride] += self.enlarge(maps[above], above, stride, f"up{stride}")

        width = max(1, self.decoder_channels // 2)
        conv = functools.partial(ConvNorm, width, norm=self.norm, dtype=self.dtype)

        def refine(x: Array, stride: int) -> Array:
            halvings = [2**i * finest for i in reversed(range((stride // finest).bit_length() - 1))]
            above = stride
            for target in halvings or [finest]:
                x = conv(name=f"refine{stride}_{target}")(x, train=train)
                x = self.enlarge(x, above, target, f"merge{stride}_{target}")
                above = target
            return x

        x = functools.reduce(jnp.add, (refine(x, stride) for stride, x in maps.items()))
        return self.classify(x, finest), {}
