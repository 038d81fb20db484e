"""ConvNeXt (arXiv 2201.03545, section 2), as in timm.

Layer norms are part of the network, so `norm` has no effect on the encoder.

At stride s, each feature covers a cell of s x s image pixels, and the receptive field is centered
on the cell.
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

CHANNELS = {4: 96, 8: 192, 16: 384, 32: 768}  # by stride
INIT = nn.initializers.truncated_normal(0.02)
norm = functools.partial(Norm, "layer", epsilon=1e-6, name="norm")


class ConvNeXt(Encoder, kw_only=True):
    """The ConvNeXt encoder, with features at strides 4, 8, 16 and 32.

    depths: The number of blocks at each stride.
    drop_path: The probability that an image skips the last block in training (arXiv 1603.09382).
      The probability grows linearly from block to block, from 0 at the first. The paper trains with
      0.1 (tiny) and 0.4 (small).
    """

    depths: Sequence[int]
    width_multiplier: float = 1.0
    drop_path: float = 0.0

    @property
    def spec(self) -> Spec:
        return Spec(tuple(CHANNELS))

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"], *, train: bool) -> Pyramid:
        x, features = image, {}
        rates = iter(np.linspace(0, self.drop_path, sum(self.depths)))
        for number, (stride, depth) in enumerate(zip(CHANNELS, self.depths, strict=True)):
            width = scaled(CHANNELS[stride], self.width_multiplier)
            downsample = Downsample(width, number == 0, self.dtype, name=f"downsample{number}")
            blocks = [
                Block(float(next(rates)), self.dtype, name=f"stage{number}_{i}")
                for i in range(depth)
            ]
            x = features[stride] = self.stage(downsample, *blocks)(x, train)
        features[32] = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Pyramid(features)


class Downsample(nn.Module):
    """A layer norm and a convolution of disjoint patches.

    In the stem, the patches are 4x4 pixels, and the layer norm follows the convolution. In later
    downsampling, the patches are 2x2 features, and the layer norm precedes the convolution.
    """

    features: int
    is_stem: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b H W f"]:
        if not self.is_stem:
            x = norm(dtype=self.dtype)(x, train=train)
        size = (4, 4) if self.is_stem else (2, 2)
        x = nn.Conv(self.features, size, size, kernel_init=INIT, dtype=self.dtype, name="conv")(x)
        return norm(dtype=self.dtype)(x, train=train) if self.is_stem else x


class Block(nn.Module):
    """A 7x7 depthwise convolution and two 1x1 convolutions, as Dense layers (figure 4)."""

    drop_path: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        width = x.shape[-1]
        dense = functools.partial(nn.Dense, kernel_init=INIT, dtype=self.dtype)
        y = nn.Conv(
            width,
            (7, 7),
            feature_group_count=width,
            kernel_init=INIT,
            dtype=self.dtype,
            name="depthwise",
        )(x)
        y = norm(dtype=self.dtype)(y, train=train)
        y = jax.nn.gelu(dense(4 * width, name="fc1")(y), approximate=False)
        y = dense(width, name="fc2")(y)
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (width,))
        y = y * gamma.astype(y.dtype).reshape(1, 1, 1, width)
        return x + drop_path(y, self.drop_path, train)


def torch_name(path: tuple[str, ...], *, norm: str) -> str:
    """Returns the name of the module at `path` in timm's convnext_tiny and convnext_small."""
    if path[0].startswith("stage"):
        block = "stages.{}.blocks.{}".format(*path[0].removeprefix("stage").split("_"))
        names = {"depthwise": "conv_dw", "norm": "norm", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
        return ".".join([block, *(names[name] for name in path[1:2])])
    number, is_norm = path[0].removeprefix("downsample"), path[1] == "norm"
    if number == "0":
        return f"stem.{int(is_norm)}"
    return f"stages.{number}.downsample.{int(not is_norm)}"
