"""Building blocks that encoders and decoders share. Feature maps are [b, h, w, c]."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dense_jax.devices.cpu import Conv
from dense_jax.geometry import reflect

NORMS = ("batch", "group", "none")
PADDINGS = ("SAME", "VALID")
CONVS = ("full", "depthwise", "none")


@struct.dataclass
class Pyramid:
    """What an encoder hands to a decoder, keyed by stride in input pixels.

    features[s]: [b, h/s, w/s, c_s]; smaller after unpadded ("VALID") convolutions.
    switches[s]: which pixel of each 2x2 window of features[s] won the max-pool that follows it,
      as 2 * row + column, [b, h/2s, w/2s, c_s]; only where the encoder max-pools 2x2.
    """

    features: Mapping[int, Array]
    switches: Mapping[int, Array] = struct.field(default_factory=dict)


def max_pool(
    x: Float[Array, "b h w c"],
) -> tuple[Float[Array, "b h/2 w/2 c"], Int[Array, "b h/2 w/2 c"]]:
    """2x2 max-pool with stride 2, and its switches as in `Pyramid`; h and w must be even.

    Three elementwise selections: their gradient is a selection too, where XLA's own pooling needs
    select-and-scatter and jnp.max divides by the number of maxima, which is 0 (and the gradient
    NaN) where the compiler recomputes x a little differently. Of equal pixels the first one wins.
    """
    b, h, w, c = x.shape
    windows = x.reshape(b, h // 2, 2, w // 2, 2, c)

    def larger(left, right):
        second = right[0] > left[0]
        return jnp.where(second, right[0], left[0]), jnp.where(second, right[1], left[1])

    upper, lower = (
        larger((windows[:, :, row, :, 0], 2 * row), (windows[:, :, row, :, 1], 2 * row + 1))
        for row in (0, 1)
    )
    return larger(upper, lower)


def max_unpool(
    x: Float[Array, "b h w c"], switches: Int[Array, "b h w c"]
) -> Float[Array, "b 2*h 2*w c"]:
    """Every value goes where its 2x2 window's maximum was; 0 elsewhere (arXiv 1511.00561)."""
    return pixel_shuffle(jnp.concatenate([jnp.where(switches == k, x, 0) for k in range(4)], -1), 2)


def pixel_shuffle(x: Float[Array, "b h w n"], factor: int) -> Float[Array, "b H W c"]:
    """Spreads a pixel's n = factor^2 * c channels, ordered (row, column, c), over its own cell."""
    b, h, w, n = x.shape
    x = x.reshape(b, h, w, factor, factor, n // factor**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, factor * h, factor * w, n // factor**2)


def center(x: Array, size: tuple[int, int]) -> Array:
    """The middle of a feature map, for one that lost its border to unpadded convolutions."""
    top, left = ((n - wanted) // 2 for n, wanted in zip(x.shape[1:3], size, strict=True))
    return x[:, top : top + size[0], left : left + size[1]]


def mirrored(
    x: Float[Array, "b h w c"], before: int, lengths: Sequence[Any]
) -> Float[Array, "b H W c"]:
    """Height and width made as long as `lengths`, by reflection about the border pixels' centers.

    before: rows above and columns to the left.

    As jnp.pad(mode="reflect"), which cannot do axes of symbolic length (jax.export).
    """
    for axis, length in enumerate(lengths, 1):
        positions = reflect(jnp.arange(length) - before, x.shape[axis])
        x = jnp.take(x, positions, axis=axis)
    return x


def scaled(channels: int, multiplier: float) -> int:
    """A published number of channels, times a width multiplier."""
    return max(1, round(multiplier * channels))


def run(stage: Callable, module: nn.Module, x: Array, *, remat: bool) -> Array:
    """stage(module, x); with `remat` only x is kept, and the rest computed again for gradients."""
    return (nn.remat(stage) if remat else stage)(module, x)


class Project(nn.Module):
    """1x1 convolution to `features` where x has another number of channels."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        if x.shape[-1] == self.features:
            return x
        return Conv(self.features, (1, 1), dtype=self.dtype, name="conv")(x)


class BatchNorm(nn.Module):
    """Batch normalization as of nn.BatchNorm, whose variables it has.

    In training it is one multiplication and sum: what is kept for the gradient is then x alone.
    """

    train: bool
    momentum: float
    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        channels = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        now = mean.value, var.value
        exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.train:
            # mean(x^2) - mean(x)^2 has no digits left where the mean is many deviations from 0. From
            # the mean of the corners it is at most sqrt(h w): they are part of the deviation.
            corners = jax.lax.stop_gradient(jnp.mean(exact[:, :1, :1], axis=(0, 1, 2)))
            moved = exact - corners[None, None, None]
            first, second = (jnp.mean(moment, axis=(0, 1, 2)) for moment in (moved, moved**2))
            now = corners + first, jnp.maximum(second - first**2, 0)
            if not self.is_initializing():
                for average, value in zip((mean, var), now, strict=True):
                    average.value = self.momentum * average.value + (1 - self.momentum) * value
        factor = scale * jax.lax.rsqrt(now[1] + self.epsilon)
        if self.train:
            factor, shift = factor[None, None, None], (bias - now[0] * factor)[None, None, None]
            return (exact * factor + shift).astype(self.dtype)
        # In this form any program rounds alike, also that of an exported model.
        centered = exact - now[0][None, None, None]
        return (centered * factor[None, None, None] + bias[None, None, None]).astype(self.dtype)


class Norm(nn.Module):
    """Batch norm over the global batch, group norm (8 groups if they divide c), or nothing."""

    kind: str
    dtype: DTypeLike = jnp.float32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        options = {"epsilon": self.epsilon, "dtype": self.dtype, "name": self.kind}
        if self.kind == "batch":
            # 0.9 rather than 0.99: the averages must be settled after a few hundred steps.
            return BatchNorm(train, momentum=0.9, **options)(x)
        if self.kind == "group":
            # More groups would be instance norm at a U-Net's 16 or 32 channels.
            return nn.GroupNorm(math.gcd(8, x.shape[-1]), **options)(x)
        return x


class ConvNorm(nn.Module):
    """Convolution, norm and ReLU.

    padding: pixels on every side, or "SAME" or "VALID".
    depthwise: one filter per channel, which x must have `features` of.
    use_bias: None is where no norm brings its own.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | str = "SAME"
    norm: str = "batch"
    relu: bool = True
    depthwise: bool = False
    use_bias: bool | None = None
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b H W f"]:
        x = Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            strides=self.stride,
            padding=self.padding,
            feature_group_count=self.features if self.depthwise else 1,
            use_bias=self.norm == "none" if self.use_bias is None else self.use_bias,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            name="conv",
        )(x)
        x = Norm(self.norm, self.dtype, self.epsilon, name="norm")(x, train=train)
        return jax.nn.relu(x) if self.relu else x


class ConvBlock(nn.Module):
    """`num_convs` times convolution, norm and ReLU; two of 3x3 in U-Net (section 2)."""

    features: int
    num_convs: int = 2
    kernel_size: int = 3
    padding: str = "SAME"
    norm: str = "batch"
    relu: bool = True
    depthwise: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b H W f"]:
        for i in range(self.num_convs):
            x = ConvNorm(
                self.features,
                self.kernel_size,
                padding=self.padding,
                norm=self.norm,
                relu=self.relu,
                depthwise=self.depthwise,
                dtype=self.dtype,
                name=f"conv{i + 1}",
            )(x, train=train)
        return x


def conv_by_patches(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c f"], strides, padding, **_
) -> Float[Array, "b h w f"]:
    """A convolution of stride 1 as one matrix product with all k x k patches of x.

    For few pixels and thousands of channels, where XLA:CPU's own is many times slower; the patches
    are k^2 times as large as x.
    """
    _, h, w, _ = x.shape
    k, _, _, features = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    shifted = [x[:, row : row + h, column : column + w] for row, column in np.ndindex(k, k)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, features)


class Classifier(nn.Module):
    """AlexNet's and VGG's fc6 and fc7 as convolutions (arXiv 1411.4038, section 3.1).

    On a feature map of the training size, kernel_size x kernel_size, the pixel at
    kernel_size // 2 is what the fully connected layers give.
    """

    features: int
    kernel_size: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w f"]:
        for name, size in (("fc6", self.kernel_size), ("fc7", 1)):
            before = size // 2
            x = nn.Conv(
                self.features,
                (size, size),
                padding=((before, size - 1 - before),) * 2,
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
                conv_general_dilated=conv_by_patches,
                name=name,
            )(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(jax.nn.relu(x))
        return x
