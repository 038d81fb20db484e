"""UPerNet's decoder for one task, semantic segmentation (Xiao et al. 2018, arXiv 1807.10221)."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.layers import ConvNorm, resize
from dense_jax.models.segmenter import Decoder, Pyramid


class UPerNet(Decoder):
    """A feature pyramid network on top of pyramid pooling, with all levels fused (figure 4).

    First, a layer norm normalizes each of the encoder's feature maps, as in
    segmentation_models.pytorch. The top-down path starts from pyramid pooling of the deepest
    features. It upsamples each level and adds a 1x1 convolution of the encoder's features at the
    next stride. Each level except the deepest then has a 3x3 convolution. All levels are upsampled
    to the finest fused stride and concatenated. A 3x3 convolution fuses them, and the scores are
    upsampled to stride 1. `upsample` does all upsampling except that of the pooled grids, whose
    sizes need not divide the size of the feature map.

    decoder_channels: The number of channels of every level.
    """

    norm: str = "batch"
    decoder_channels: int = 256

    default_skips: ClassVar[Sequence[int] | None] = (4, 8, 16)

    @nn.compact
    def __call__(self, pyramid: Pyramid, *, train: bool) -> tuple[Array, dict[int, Array]]:
        conv = functools.partial(ConvNorm, norm=self.norm, dtype=self.dtype)
        width = self.decoder_channels
        strides = self.fused_strides(pyramid)
        deepest, finest = strides[0], strides[-1]
        features = {}
        for stride in strides:
            norm = nn.LayerNorm(1e-6, self.dtype, use_fast_variance=False, name=f"norm{stride}")
            features[stride] = norm(pyramid.features[stride])
        pooling = PyramidPooling(width, conv, name="pooling")
        maps = {deepest: pooling(features[deepest], train=train)}
        for above, stride in itertools.pairwise(strides):
            lateral = conv(width, 1, name=f"lateral{stride}")
            x = lateral(features[stride], train=train)
            maps[stride] = x + self.enlarge(maps[above], above, stride, f"up{stride}")
        levels = []
        for stride, x in reversed(maps.items()):
            if stride < deepest:
                x = conv(width, name=f"refine{stride}")(x, train=train)
            levels.append(self.enlarge(x, stride, finest, f"merge{stride}"))
        x = conv(width, name="fuse")(jnp.concatenate(levels, axis=-1), train=train)
        return self.classify(x, finest), {}


class PyramidPooling(nn.Module):
    """Pyramid pooling (Zhao et al. 2017, arXiv 1612.01105, section 3.2).

    Averages x over grids of 1, 2, 3 and 6 cells per side. A 1x1 convolution gives each grid
    `features` channels, and the grid is interpolated bilinearly to the size of x. A 3x3 convolution
    fuses x and the interpolated grids.
    """

    features: int
    conv: Callable[..., ConvNorm]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w f"]:
        maps = [x]
        for cells in (1, 2, 3, 6):
            grid = self.conv(self.features, 1, name=f"grid{cells}")(pool(x, cells), train=train)
            maps.append(resize(grid, x.shape[1:3]).astype(x.dtype))
        return self.conv(self.features, name="fuse")(jnp.concatenate(maps, -1), train=train)


def pool(x: Float[Array, "b h w c"], cells: int) -> Float[Array, "b {cells} {cells} c"]:
    """Returns the mean of x in each cell of a grid of cells x cells.

    Along an axis of n pixels, cell i holds the pixels from floor(i n / cells) to
    ceil((i + 1) n / cells) - 1, as in PyTorch's adaptive_avg_pool2d. If n is not a multiple of
    `cells`, adjacent cells can share pixels.
    """
    cell = jnp.arange(cells)[:, None]
    pooled = x.astype(jnp.float32)
    for product, length in zip(("bhwc,Hh->bHwc", "bhwc,Ww->bhWc"), x.shape[1:3], strict=True):
        pixel = jnp.arange(length)[None]
        inside = (cell * length // cells <= pixel) & (pixel * cells < (cell + 1) * length)
        weights = inside / jnp.sum(inside, axis=1, keepdims=True)
        pooled = jnp.einsum(product, pooled, weights, precision="highest")
    return pooled.astype(x.dtype)
