"""Building blocks shared by encoders and decoders. Feature maps are [b, h, w, c]."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dense_jax.geometry import reflect

NORMS = ("batch", "group", "none")
PADDINGS = ("SAME", "VALID")


def max_pool(
    x: Float[Array, "b h w c"],
) -> tuple[Float[Array, "b h/2 w/2 c"], Int[Array, "b h/2 w/2 c"]]:
    """Returns the 2x2 max-pool with stride 2 and its argmax indices (switches, see `Pyramid`).

    h and w must be even. If several pixels of a window are equal, the first pixel wins.
    """
    # Three elementwise selections compute the pool, and three its gradient. XLA's pooling needs a
    # select-and-scatter. The gradient of jnp.max divides by the number of maxima, which can be 0 if
    # the compiler recomputes x with other rounding. The gradient is then NaN.
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
    """Puts each value at the argmax pixel of its 2x2 window, and 0 elsewhere (arXiv 1511.00561)."""
    return pixel_shuffle(jnp.concatenate([jnp.where(switches == k, x, 0) for k in range(4)], -1), 2)


def pixel_shuffle(x: Float[Array, "b h w n"], factor: int) -> Float[Array, "b H W c"]:
    """Rearranges each pixel's channels, ordered (row, column, c), into factor x factor pixels."""
    b, h, w, n = x.shape
    x = x.reshape(b, h, w, factor, factor, n // factor**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, factor * h, factor * w, n // factor**2)


def center(x: Array, size: Sequence[int]) -> Array:
    """Center-crops a feature map to the height and width in `size`."""
    top, left = ((n - wanted) // 2 for n, wanted in zip(x.shape[1:3], size, strict=True))
    return x[:, top : top + size[0], left : left + size[1]]


def mirrored(
    x: Float[Array, "b h w c"], before: int, lengths: Sequence[Any]
) -> Float[Array, "b H W c"]:
    """Extends height and width to `lengths` by reflection about the centers of the border pixels.

    Equivalent to jnp.pad(mode="reflect"), but also supports axes of symbolic length (jax.export).

    before: The number of rows added at the top and of columns added on the left.
    """
    for axis, length in enumerate(lengths, 1):
        positions = reflect(jnp.arange(length) - before, x.shape[axis])
        x = jnp.take(x, positions, axis=axis)
    return x


def resize(image: Float[Array, "*b h w c"], size: Sequence[Any]) -> Float[Array, "*b H W c"]:
    """Resizes images bilinearly, with half-pixel centers and clamped edges.

    Like jax.image.resize(antialias=False), but computes the interpolation weights from integers, so
    that symbolic sizes (jax.export) and concrete sizes give bitwise equal weights.
    """
    products = ("...hwc,Hh->...Hwc", "...hwc,Ww->...hWc")
    for product, old, new in zip(products, image.shape[-3:-1], size, strict=True):
        # Positions relative to the first old pixel center, in units of 1 / (2 * new) old pixels.
        old_centers = 2 * new * jnp.arange(old)[None]
        new_centers = ((2 * jnp.arange(new) + 1) * old - new)[:, None]
        distances = jnp.abs(jnp.clip(new_centers, 0, 2 * new * (old - 1)) - old_centers)
        weights = jnp.maximum(0, 2 * new - distances).astype(jnp.float32) / jnp.float32(2 * new)
        image = jnp.einsum(product, image, weights, precision="highest")
    return image


def scaled(channels: int, multiplier: float) -> int:
    """Returns a published number of channels times a width multiplier, rounded and at least 1."""
    return max(1, round(multiplier * channels))


class Stage(nn.Module):
    """Applies layers in sequence.

    A Stage does not appear in parameter paths, because the layers are submodules of the Module that
    creates them.
    """

    layers: Sequence[nn.Module]

    def __call__(self, x: Array, train: bool) -> Array:
        for layer in self.layers:
            x = layer(x, train=train)
        return x


class Project(nn.Module):
    """A 1x1 convolution to `features` channels, or the identity if x already has that many."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        if x.shape[-1] == self.features:
            return x
        return nn.Conv(self.features, (1, 1), dtype=self.dtype, name="conv")(x)


def drop_path(x: Float[Array, "b h w c"], rate: float, train: bool) -> Float[Array, "b h w c"]:
    """Returns x / (1 - rate), or 0 for a random fraction `rate` of the images (arXiv 1603.09382).

    In evaluation, returns x. Call this function in the compact method of a Module.
    """
    return nn.Dropout(rate, broadcast_dims=(1, 2, 3), deterministic=not train)(x)


class Norm(nn.Module):
    """Batch norm over the global batch, group norm with gcd(8, c) groups, or the identity.

    Encoders whose layer norms are part of the network use a fourth kind, "layer".
    """

    kind: str
    dtype: DTypeLike = jnp.float32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        options = {"epsilon": self.epsilon, "dtype": self.dtype, "name": self.kind}
        if self.kind == "batch":
            # Momentum 0.99 is too slow, because the averages must settle in a few hundred steps.
            # Fast variance loses all precision if a mean is many standard deviations from 0.
            return nn.BatchNorm(not train, momentum=0.9, use_fast_variance=False, **options)(x)
        if self.kind == "group":
            # With more groups, a small U-Net with 16 or 32 channels would get instance norm.
            return nn.GroupNorm(math.gcd(8, x.shape[-1]), **options)(x)
        if self.kind == "layer":
            return nn.LayerNorm(use_fast_variance=False, **options)(x)
        return x


class ConvNorm(nn.Module):
    """A convolution followed by a norm and an activation function.

    padding: The number of pixels added on every side, or "SAME" or "VALID".
    dilation: The distance between adjacent taps of the kernel, in pixels.
    depthwise: Whether to filter each channel separately. If True, x must have `features` channels.
    use_bias: Whether the convolution has a bias. If None, it has a bias only if there is no norm.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | str = "SAME"
    norm: str = "batch"
    activation: Callable[[Array], Array] | None = jax.nn.relu
    depthwise: bool = False
    use_bias: bool | None = None
    epsilon: float = 1e-5
    dilation: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b H W f"]:
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            strides=self.stride,
            padding=self.padding,
            kernel_dilation=self.dilation,
            feature_group_count=self.features if self.depthwise else 1,
            use_bias=self.norm == "none" if self.use_bias is None else self.use_bias,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            name="conv",
        )(x)
        x = Norm(self.norm, self.dtype, self.epsilon, name="norm")(x, train=train)
        return x if self.activation is None else self.activation(x)


class ConvBlock(nn.Module):
    """A sequence of ConvNorms with equal options, such as U-Net's two 3x3 convolutions (section 2).

    conv: The factory for the ConvNorms, called with `features` and `name`.
    """

    features: int
    num_convs: int
    conv: Callable[..., ConvNorm]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b H W f"]:
        for i in range(self.num_convs):
            x = self.conv(self.features, name=f"conv{i + 1}")(x, train=train)
        return x


class Classifier(nn.Module):
    """AlexNet's and VGG's fc6 and fc7, as convolutions (arXiv 1411.4038, section 3.1).

    For a map of kernel_size x kernel_size pixels, as in pretraining, the output pixel in row and
    column kernel_size // 2 equals the output of the fully connected layers.
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
                name=name,
            )(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(jax.nn.relu(x))
        return x
