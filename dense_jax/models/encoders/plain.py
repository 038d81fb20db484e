"""U-Net's contracting path (arXiv 1505.04597, section 2); without its bottom, SegNet-Basic's."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dense_jax.models.layers import ConvBlock, Pyramid, max_pool, run


class Plain(nn.Module):
    """One ConvBlock per width and a 2x2 max-pool after it: strides 1, 2, 4, ...

    bottleneck: whether the last block is the deepest; else a last max-pool follows it, whose
      output is (SegNet).
    """

    widths: Sequence[int]
    norm: str = "batch"
    convs_per_level: int = 2
    kernel_size: int = 3
    padding: str = "SAME"
    bottleneck: bool = True
    dropout: float = 0.0
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(2**level for level in range(len(self.widths) + (not self.bottleneck)))

    @property
    def switch_strides(self) -> tuple[int, ...]:
        return self.strides[:-1]

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"], *, train: bool) -> Pyramid:
        features, switches = {}, {}
        x = image
        # No width is left for the stride that is nothing but the last max-pool.
        for stride, width in zip(self.strides, self.widths, strict=self.bottleneck):

            def stage(module, x, stride=stride, width=width):
                return ConvBlock(
                    width,
                    self.convs_per_level,
                    self.kernel_size,
                    self.padding,
                    self.norm,
                    dtype=self.dtype,
                    name=f"stride{stride}",
                )(x, train=train)

            x = features[stride] = run(stage, self, x, remat=self.remat)
            if stride in self.switch_strides:
                x, switches[stride] = max_pool(x)
        deepest = self.strides[-1]
        features[deepest] = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Pyramid(features, switches)
