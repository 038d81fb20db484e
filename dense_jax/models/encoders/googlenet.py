"""GoogLeNet (Szegedy et al. 2015, arXiv 1409.4842, table 1), as in torchvision.

Unlike the paper, torchvision uses batch norm, and 3x3 convolutions in the branches that the paper
calls 5x5.

A feature vector at stride s represents a cell of s x s image pixels. At strides 2, 4, 8, 16 and
32, the center of its receptive field is offset from the cell's center by -0.5, 0.5, 2.5, 6.5 and
6.5 pixels (positive: down and to the right).
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.layers import ConvNorm, max_pool, scaled
from dense_jax.models.segmenter import Encoder, Pyramid, Spec

STAGES = {  # by stride: channels of (1x1, 3x3 reduced, 3x3, 5x5 reduced, 5x5, pool projection)
    8: {"3a": (64, 96, 128, 16, 32, 32), "3b": (128, 128, 192, 32, 96, 64)},
    16: {
        "4a": (192, 96, 208, 16, 48, 64),
        "4b": (160, 112, 224, 24, 64, 64),
        "4c": (128, 128, 256, 24, 64, 64),
        "4d": (112, 144, 288, 32, 64, 64),
        "4e": (256, 160, 320, 32, 128, 128),
    },
    32: {"5a": (256, 160, 320, 32, 128, 128), "5b": (384, 192, 384, 48, 128, 128)},
}


class GoogLeNet(Encoder):
    """The GoogLeNet encoder, with features at strides 2, 4, 8, 16 and 32 (inception 5b)."""

    width_multiplier: float = 1.0

    @property
    def spec(self) -> Spec:
        return Spec((2, 4, 8, 16, 32), switch_strides=(16,))

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"], *, train: bool) -> Pyramid:
        conv = functools.partial(self.conv, epsilon=1e-3)

        def scale(channels):
            return scaled(channels, self.width_multiplier)

        features, switches = {}, {}
        stem = conv(scale(64), 7, stride=2, padding=3, name="conv1")
        x = features[2] = self.stage(stem)(image, train)
        convs = conv(scale(64), 1, name="conv2"), conv(scale(192), 3, name="conv3")
        x = features[4] = self.stage(*convs)(halve(x), train)
        for stride, blocks in STAGES.items():
            if stride == 32:
                x, switches[16] = max_pool(x)
            else:
                x = halve(x)
            inceptions = [
                Inception(tuple(map(scale, widths)), conv, name=f"inception{name}")
                for name, widths in blocks.items()
            ]
            x = features[stride] = self.stage(*inceptions)(x, train)
        features[32] = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Pyramid(features, switches)


class Inception(nn.Module):
    """Four parallel branches with concatenated outputs (figure 2b)."""

    widths: tuple[int, ...]
    conv: Callable[..., ConvNorm]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w f"]:
        direct, reduce3, width3, reduce5, width5, projected = self.widths

        def branch(x, *convs):
            for name, width, kernel_size in convs:
                x = self.conv(width, kernel_size, name=name)(x, train=train)
            return x

        pooled = nn.max_pool(x, (3, 3), padding="SAME")
        branches = (
            branch(x, ("branch1", direct, 1)),
            branch(x, ("branch2_0", reduce3, 1), ("branch2_1", width3, 3)),
            branch(x, ("branch3_0", reduce5, 1), ("branch3_1", width5, 3)),
            branch(pooled, ("branch4_1", projected, 1)),
        )
        return jnp.concatenate(branches, axis=-1)


def halve(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    """Returns the 3x3 max-pool with stride 2. The last window extends one pixel past the border."""
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((0, 1), (0, 1)))


def torch_name(path: tuple[str, ...], *, norm: str) -> str:
    """Returns the name of the module at `path` in torchvision's googlenet."""
    last = "bn" if "norm" in path else "conv"
    blocks = path[: path.index("norm" if last == "bn" else "conv")]
    return ".".join((*blocks, last)).replace("_", ".")
