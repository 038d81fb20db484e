"""Content-aware reassembly of features (CARAFE, Wang et al. 2019, arXiv 1905.02188)."""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.layers import Project, pixel_shuffle
from dense_jax.models.segmenter import Upsampler

# The paper's sizes (section 3.2).
COMPRESSED_CHANNELS = 64
ENCODER_KERNEL_SIZE = 3
KERNEL_SIZE = 5


class CARAFE(Upsampler):
    """Averages the 5x5 input pixels around each cell, with weights predicted from the input.

    Each output pixel has 25 weights, which all channels share. A 1x1 convolution to 64 channels, a
    3x3 convolution and a softmax predict the weights (section 3.2). As in the authors' code, the
    initial weights are almost equal, and pixels outside x count as 0.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        x = Project(self.features, self.dtype, name="project")(x)
        kernels = nn.Conv(
            COMPRESSED_CHANNELS,
            (1, 1),
            kernel_init=nn.initializers.xavier_uniform(),
            dtype=self.dtype,
            name="compress",
        )(x)
        kernels = nn.Conv(
            self.factor**2 * KERNEL_SIZE**2,
            (ENCODER_KERNEL_SIZE, ENCODER_KERNEL_SIZE),
            kernel_init=nn.initializers.normal(0.001),
            dtype=self.dtype,
            name="encode",
        )(kernels)
        kernels = kernels.reshape(*kernels.shape[:3], self.factor**2, KERNEL_SIZE**2)
        return pixel_shuffle(
            reassemble(x, jax.nn.softmax(kernels.astype(jnp.float32))), self.factor
        )


# Without the checkpoint, the backward pass would store every shifted copy of x.
@jax.checkpoint
def reassemble(
    x: Float[Array, "b h w c"], kernels: Float[Array, "b h w p taps"]
) -> Float[Array, "b h w p*c"]:
    """Returns p weighted sums of the k x k pixels around each pixel of x.

    Pixels outside x count as 0.

    kernels: For each of the p sums, the weights of the k x k pixels, row by row.
    """
    _, h, w, _ = x.shape
    size = math.isqrt(kernels.shape[-1])
    padding = (size // 2, size // 2)
    padded = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    terms = (
        kernels[..., size * i + j, None] * padded[:, i : i + h, j : j + w, None]
        for i in range(size)
        for j in range(size)
    )
    total = functools.reduce(operator.add, terms).astype(x.dtype)
    return total.reshape(*total.shape[:3], -1)
