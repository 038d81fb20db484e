"""The encoder of U-Net (arXiv 1505.04597, section 2) or, without a bottleneck, of SegNet-Basic."""

import functools
from collections.abc import Sequence

from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.layers import ConvBlock, max_pool
from dense_jax.models.segmenter import Encoder, Pyramid, Spec


class Plain(Encoder, kw_only=True):
    """ConvBlocks at strides 1, 2, 4, ..., one per width, with 2x2 max-pools between them.

    bottleneck: Whether the deepest features are the output of the last block, as in U-Net. If
      False, the deepest features are the output of a max-pool after the last block, as in SegNet.
    """

    widths: Sequence[int]
    convs_per_level: int = 2
    kernel_size: int = 3
    padding: str = "SAME"
    bottleneck: bool = True

    @property
    def spec(self) -> Spec:
        strides = tuple(2**level for level in range(len(self.widths) + (not self.bottleneck)))
        is_unpadded = self.padding == "VALID"
        loss = self.convs_per_level * (self.kernel_size - 1) if is_unpadded else 0
        return Spec(strides, strides[:-1], loss, loss if self.bottleneck else 0)

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"], *, train: bool) -> Pyramid:
        conv = functools.partial(self.conv, kernel_size=self.kernel_size, padding=self.padding)
        features, switches = {}, {}
        x = image
        # Without a bottleneck, the deepest stride has no width.
        for stride, width in zip(self.spec.strides, self.widths, strict=self.bottleneck):
            block = ConvBlock(width, self.convs_per_level, conv, name=f"stride{stride}")
            x = features[stride] = self.stage(block)(x, train)
            if stride in self.spec.switch_strides:
                x, switches[stride] = max_pool(x)
        deepest = self.spec.strides[-1]
        features[deepest] = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Pyramid(features, switches)
