"""SegFormer's Mix Transformer (MiT, arXiv 2105.15203, section 3.1), as in transformers.

Layer norms are part of the network, so `norm` has no effect on the encoder.

Attention reaches all pixels of the input. In a prediction by tiles, features therefore depend on
the whole tile.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dense_jax.models.layers import Norm, drop_path, scaled
from dense_jax.models.segmenter import Encoder, Pyramid, Spec

HEADS = {4: 1, 8: 2, 16: 5, 32: 8}  # the number of attention heads by stride
norm = functools.partial(Norm, "layer", epsilon=1e-5)


class MiT(Encoder, kw_only=True):
    """The MiT encoder, with features at strides 4, 8, 16 and 32.

    depths: The number of blocks at each stride.
    head_width: The number of channels of an attention head.
    drop_path: The probability that an image skips the attention of the last block in training
      (arXiv 1603.09382). The block's feed-forward network is skipped with the same probability. The
      probability grows linearly from block to block, from 0 at the first. The paper's code trains
      with 0.1.
    """

    depths: Sequence[int]
    head_width: int
    width_multiplier: float = 1.0
    drop_path: float = 0.0

    @property
    def spec(self) -> Spec:
        return Spec(tuple(HEADS))

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"], *, train: bool) -> Pyramid:
        x, features = image, {}
        rates = iter(np.linspace(0, self.drop_path, sum(self.depths)))
        for number, (stride, depth) in enumerate(zip(HEADS, self.depths, strict=True)):
            width = HEADS[stride] * scaled(self.head_width, self.width_multiplier)
            embedding = PatchEmbedding(width, number == 0, self.dtype, name=f"embedding{number}")
            blocks = [
                Block(
                    HEADS[stride],
                    32 // stride,
                    float(next(rates)),
                    self.dtype,
                    name=f"stage{number}_{i}",
                )
                for i in range(depth)
            ]
            last = norm(dtype=self.dtype, name=f"norm{number}")
            x = features[stride] = self.stage(embedding, *blocks, last)(x, train)
        features[32] = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Pyramid(features)


class PatchEmbedding(nn.Module):
    """A convolution of overlapping patches, 7x7 with stride 4 or 3x3 with stride 2, and a norm."""

    features: int
    is_first: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b H W f"]:
        size, stride = (7, 4) if self.is_first else (3, 2)
        x = nn.Conv(
            self.features,
            (size, size),
            stride,
            padding=size // 2,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            name="conv",
        )(x)
        return norm(dtype=self.dtype, name="norm")(x, train=train)


class Block(nn.Module):
    """Self-attention and a feed-forward network with a 3x3 depthwise convolution (Mix-FFN).

    reduction: The stride of the convolution that reduces the number of keys and values.
    """

    heads: int
    reduction: int
    drop_path: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        width = x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        y = norm(dtype=self.dtype, name="norm1")(x, train=train)
        y = Attention(self.heads, self.reduction, self.dtype, name="attention")(y, train=train)
        x = x + drop_path(y, self.drop_path, train)
        y = norm(dtype=self.dtype, name="norm2")(x, train=train)
        y = dense(4 * width, name="fc1")(y)
        y = nn.Conv(
            4 * width, (3, 3), feature_group_count=4 * width, dtype=self.dtype, name="depthwise"
        )(y)
        y = dense(width, name="fc2")(jax.nn.gelu(y, approximate=False))
        return x + drop_path(y, self.drop_path, train)


class Attention(nn.Module):
    """Multi-head attention of all pixels to the pixels of a reduced map (equation 2)."""

    heads: int
    reduction: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        b, _, _, width = x.shape
        dense = functools.partial(nn.Dense, width, dtype=self.dtype)

        def split(y):
            return y.reshape(b, y.shape[1] * y.shape[2], self.heads, width // self.heads)

        query = split(dense(name="query")(x))
        reduced = x
        if self.reduction > 1:
            size = (self.reduction, self.reduction)
            reduced = nn.Conv(width, size, size, dtype=self.dtype, name="reduce")(x)
            reduced = norm(dtype=self.dtype, name="norm")(reduced, train=train)
        key, value = split(dense(name="key")(reduced)), split(dense(name="value")(reduced))
        y = nn.dot_product_attention(query, key, value)
        return dense(name="out")(y.reshape(x.shape))


def torch_name(path: tuple[str, ...], *, norm: str) -> str:
    """Returns the name of the module at `path` in transformers' SegformerForImageClassification."""
    name = path[0].rstrip("_0123456789")
    numbers = path[0].removeprefix(name).replace("_", ".")
    blocks = {"stage": "block", "embedding": "patch_embeddings", "norm": "layer_norm"}
    parts: dict[tuple[str, ...], str] = {
        (): "",
        ("conv",): ".proj",
        ("norm",): ".layer_norm",
        ("norm1",): ".layer_norm_1",
        ("attention", "query"): ".attention.self.query",
        ("attention", "key"): ".attention.self.key",
        ("attention", "value"): ".attention.self.value",
        ("attention", "reduce"): ".attention.self.sr",
        ("attention", "norm"): ".attention.self.layer_norm",
        ("attention", "out"): ".attention.output.dense",
        ("norm2",): ".layer_norm_2",
        ("fc1",): ".mlp.dense1",
        ("depthwise",): ".mlp.dwconv.dwconv",
        ("fc2",): ".mlp.dense2",
    }
    rest = tuple(part for part in path[1:] if part != "layer")
    return f"segformer.encoder.{blocks[name]}.{numbers}{parts[rest]}"
