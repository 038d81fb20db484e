"""Building blocks that encoders and decoders share. Feature maps are [b, h, w, c]."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

NORMS = ("batch", "group", "none")


@struct.dataclass
class Pyramid:
    """What an encoder hands to a decoder, keyed by stride in input pixels.

    features[s]: [b, h/s, w/s, c_s].
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


class Norm(nn.Module):
    """Batch norm over the global batch, group norm (8 groups if they divide c), or nothing."""

    kind: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        if self.kind == "batch":
            # 0.9 rather than 0.99: the averages must be settled after a few hundred steps.
            return nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name="batch")(x)
        if self.kind == "group":
            # More groups would be instance norm at a U-Net's 16 or 32 channels.
            return nn.GroupNorm(math.gcd(8, x.shape[-1]), dtype=self.dtype, name="group")(x)
        return x


class ConvBlock(nn.Module):
    """Two times 3x3 convolution, norm, ReLU (U-Net, section 2)."""

    features: int
    norm: str = "batch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w f"]:
        for _ in range(2):
            x = nn.Conv(
                self.features,
                (3, 3),
                use_bias=self.norm == "none",  # a norm brings its own
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
            )(x)
            x = jax.nn.relu(Norm(self.norm, self.dtype)(x, train=train))
        return x
