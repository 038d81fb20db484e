"""U-Net's expanding path (Ronneberger et al. 2015, arXiv 1505.04597, figure 1)."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dense_jax.models.layers import ConvBlock, Pyramid

FUSIONS = ("concat", "add")


class UNet(nn.Module):
    """Doubles the deepest features up to stride 1 and fuses the encoder's on the way.

    upsample: makes an upsampler, called with `features`.
    widths: channels at strides 1, 2, 4, ...
    skips: the strides whose encoder features are fused.
    """

    num_classes: int
    upsample: Callable[..., nn.Module]
    widths: Sequence[int]
    skips: Sequence[int]
    fusion: str = "concat"
    norm: str = "batch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pyramid: Pyramid, *, train: bool) -> Float[Array, "b h w num_classes"]:
        stride = max(pyramid.features)
        x = pyramid.features[stride]
        while stride > 1:
            stride //= 2
            width = self.widths[stride.bit_length() - 1]
            x = self.upsample(features=width, name=f"up{stride}")(x, pyramid.switches.get(stride))
            if stride in self.skips:
                x = self.fuse(pyramid.features[stride], x)
            x = ConvBlock(width, self.norm, self.dtype, name=f"stride{stride}")(x, train=train)
        return nn.Conv(self.num_classes, (1, 1), dtype=self.dtype, name="head")(x)

    def fuse(self, skip: Float[Array, "b h w c"], x: Float[Array, "b h w d"]) -> Array:
        return skip + x if self.fusion == "add" else jnp.concatenate([skip, x], axis=-1)
