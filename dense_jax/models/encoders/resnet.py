"""ResNet 18, 34, 50 and 101 (He et al. 2016, arXiv 1512.03385, table 1), as in torchvision.

A bottleneck block applies its stride in the 3x3 convolution.

A feature vector at stride s represents a cell of s x s image pixels. Its receptive field is
centered on the cell's top-left pixel.
"""

from collections.abc import Callable, Sequence

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.encoders.dilated import DilatedEncoder
from dense_jax.models.layers import ConvNorm, scaled
from dense_jax.models.segmenter import Pyramid


class ResNet(DilatedEncoder, kw_only=True):
    """The ResNet encoder, with features at strides 2 (conv1), 4, 8, 16 and 32.

    depths: The number of blocks at each stride from 4 to 32.
    """

    depths: Sequence[int]
    block: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"], *, train: bool) -> Pyramid:
        stem = self.conv(scaled(64, self.width_multiplier), 7, stride=2, padding=3, name="conv1")
        stages: dict[int, list[nn.Module]] = {2: [stem], 4: [MaxPool()], 8: [], 16: [], 32: []}
        entering = 4
        for number, (stride, depth) in enumerate(zip((4, 8, 16, 32), self.depths, strict=True), 1):
            for i in range(depth):
                block = self.block(
                    16 * stride,
                    self.width_multiplier,
                    strided=self.conv_between(entering, stride),
                    conv=self.conv_between(stride, stride),
                    name=f"layer{number}_{i}",
                )
                stages[stride].append(block)
                entering = stride
        return self.apply_stages(stages, image, train)


class MaxPool(nn.Module):
    """A 3x3 max-pool of stride 2 with one pixel of padding."""

    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b H W c"]:
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class BasicBlock(nn.Module):
    """A block of two 3x3 convolutions (figure 5, left) with width * width_multiplier channels.

    strided: The factory for the convolutions with the block's stride.
    conv: The factory for the other convolutions.
    """

    width: int
    width_multiplier: float
    strided: Callable[..., ConvNorm]
    conv: Callable[..., ConvNorm]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b H W f"]:
        width = scaled(self.width, self.width_multiplier)
        y = self.strided(width, 3, name="conv1")(x, train=train)
        y = self.conv(width, 3, activation=None, name="conv2")(y, train=train)
        return jax.nn.relu(y + shortcut(x, y, self.strided, train))


class Bottleneck(nn.Module):
    """A block of 1x1, 3x3 and 1x1 convolutions (figure 5, right) with 4 * width output channels.

    The fields are those of BasicBlock.
    """

    width: int
    width_multiplier: float
    strided: Callable[..., ConvNorm]
    conv: Callable[..., ConvNorm]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b H W f"]:
        width = scaled(self.width, self.width_multiplier)
        wide = scaled(4 * self.width, self.width_multiplier)
        y = self.conv(width, 1, name="conv1")(x, train=train)
        y = self.strided(width, 3, name="conv2")(y, train=train)
        y = self.conv(wide, 1, activation=None, name="conv3")(y, train=train)
        return jax.nn.relu(y + shortcut(x, y, self.strided, train))


def shortcut(x: Array, y: Array, strided: Callable[..., ConvNorm], train: bool) -> Array:
    """Returns x, projected by a 1x1 convolution if y has another shape (section 4.1, option B)."""
    if x.shape == y.shape:
        return x
    return strided(y.shape[-1], 1, activation=None, name="downsample")(x, train=train)


def torch_name(path: tuple[str, ...], *, norm: str) -> str:
    """Returns the name of the module at `path` in torchvision's and timm's resnets."""
    block = f"{path[0].replace('_', '.')}." if path[0].startswith("layer") else ""
    name = path[1] if block else path[0]
    is_norm = "norm" in path
    if name == "downsample":
        return f"{block}downsample.{int(is_norm)}"
    return block + (name.replace("conv", "bn") if is_norm else name)
