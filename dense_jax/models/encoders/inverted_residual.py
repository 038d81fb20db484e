"""The base class of MobileNetV3 and EfficientNet: encoders of inverted residual blocks."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dense_jax.models.encoders.dilated import DilatedEncoder
from dense_jax.models.layers import ConvNorm, drop_path, scaled
from dense_jax.models.segmenter import Pyramid


class Stage(NamedTuple):
    """A sequence of blocks with the same number of output channels.

    stride: The stride of the first block.
    expanded: The number of channels of the depthwise convolution of each block.
    squeezes: Whether the blocks have squeeze-and-excitation.
    """

    channels: int
    kernel_size: int
    stride: int
    expanded: tuple[int, ...]
    activation: Callable[[Array], Array]
    squeezes: bool = False


class InvertedResiduals(DilatedEncoder, kw_only=True):
    """A 3x3 convolution of stride 2, stages of blocks, and possibly a 1x1 convolution.

    stem: The number of channels of the first convolution.
    activation: The activation function of the first and the last convolution.
    conv_options: The options of all ConvNorms.
    last: The number of channels of the 1x1 convolution after the last stage. If None, there is no
      such convolution.
    drop_path: The probability that an image skips the last block in training (arXiv 1603.09382).
      The probability grows linearly from block to block, from 0 at the first. Blocks without a
      residual connection are never skipped.
    """

    stem: int
    stages: Sequence[Stage]
    activation: Callable[[Array], Array]
    conv_options: Mapping[str, Any]
    last: int | None = None
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"], *, train: bool) -> Pyramid:
        scale = functools.partial(scaled, multiplier=self.width_multiplier)
        make = functools.partial(self.conv_between, **self.conv_options)
        stem = make(1, 2, activation=self.activation)(scale(self.stem), 3, name="stem")
        stages: dict[int, list[nn.Module]] = {2: [stem]}
        inputs, stride = self.stem, 2
        rates = iter(np.linspace(0, self.drop_path, sum(len(s.expanded) for s in self.stages)))
        for number, stage in enumerate(self.stages):
            for i, expanded in enumerate(stage.expanded):
                entering, stride = stride, stride * (stage.stride if i == 0 else 1)
                block = InvertedResidual(
                    scale(stage.channels),
                    scale(expanded),
                    stage.kernel_size,
                    scale(divisible(expanded / 4)) if stage.squeezes else None,
                    expands=expanded != inputs,
                    is_residual=(inputs, stride) == (stage.channels, entering),
                    drop_path=float(next(rates)),
                    strided=make(entering, stride, activation=stage.activation),
                    conv=make(stride, stride, activation=stage.activation),
                    dtype=self.dtype,
                    name=f"stage{number}_{i}",
                )
                stages.setdefault(stride, []).append(block)
                inputs = stage.channels
        if self.last:
            last = make(stride, stride, activation=self.activation)
            stages[stride].append(last(scale(self.last), 1, name="last"))
        return self.apply_stages(stages, image, train)


class InvertedResidual(nn.Module):
    """A 1x1, a depthwise and a linear 1x1 convolution (MobileNetV2, arXiv 1801.04381, figure 4).

    expanded: The number of channels of the depthwise convolution.
    squeezed: The number of channels inside squeeze-and-excitation. If None, the block has no
      squeeze-and-excitation.
    expands: Whether there is a first 1x1 convolution.
    strided: The factory for the depthwise convolution.
    conv: The factory for the 1x1 convolutions.
    """

    features: int
    expanded: int
    kernel_size: int
    squeezed: int | None
    expands: bool
    is_residual: bool
    drop_path: float
    strided: Callable[..., ConvNorm]
    conv: Callable[..., ConvNorm]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b H W f"]:
        y = self.conv(self.expanded, 1, name="expand")(x, train=train) if self.expands else x
        depthwise = self.strided(y.shape[-1], self.kernel_size, depthwise=True, name="depthwise")
        y = depthwise(y, train=train)
        if self.squeezed:
            y = SqueezeExcite(self.squeezed, self.dtype, name="squeeze")(y)
        y = self.conv(self.features, 1, activation=None, name="project")(y, train=train)
        return x + drop_path(y, self.drop_path, train) if self.is_residual else y


class SqueezeExcite(nn.Module):
    """Multiplies each channel by a factor computed from the means of all channels.

    MobileNetV3, arXiv 1905.02244, section 5.3. The means are over the height and the width of x.
    """

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        conv = functools.partial(nn.Conv, kernel_size=(1, 1), dtype=self.dtype)
        means = x.mean(axis=(1, 2), keepdims=True)
        y = jax.nn.relu(conv(self.features, name="reduce")(means))
        return x * jax.nn.hard_sigmoid(conv(x.shape[-1], name="expand")(y))


def divisible(channels: float) -> int:
    """Returns a multiple of 8 near `channels` that is at least 8 and at least 0.9 * `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
