"""U-Net's contracting path (arXiv 1505.04597, section 2), with 'same' padding."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dense_jax.models.layers import ConvBlock, Pyramid, max_pool


class Plain(nn.Module):
    """One ConvBlock per width, a 2x2 max-pool between them: strides 1, 2, 4, ..."""

    widths: Sequence[int]
    norm: str = "batch"
    dtype: DTypeLike = jnp.float32

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(2**level for level in range(len(self.widths)))

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"], *, train: bool) -> Pyramid:
        features, switches = {}, {}
        x = image
        for stride, width in zip(self.strides, self.widths, strict=True):
            if stride > 1:
                x, switches[stride // 2] = max_pool(x)
            x = ConvBlock(width, self.norm, self.dtype, name=f"stride{stride}")(x, train=train)
            features[stride] = x
        return Pyramid(features, switches)
