"""Upsampling by sampling at learned points (DySample, Liu et al. 2023, arXiv 2308.15085)."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.layers import Project, pixel_shuffle
from dense_jax.models.segmenter import Upsampler

# The defaults of the authors' code.
GROUPS = 4
SCOPE = 0.25  # the static scope factor, by which offsets in input pixels are multiplied


class DySample(Upsampler):
    """Samples x bilinearly at each output pixel's position plus an offset predicted from x.

    A 1x1 convolution predicts the offsets at the resolution of x. A static scope factor then scales
    them (section 3; "lp" in the paper). The initial offsets are almost 0, so the method starts as
    bilinear interpolation. Each of gcd(4, features) groups of channels has separate offsets.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], switches=None) -> Float[Array, "b H W f"]:
        x = Project(self.features, self.dtype, name="project")(x)
        groups = math.gcd(GROUPS, self.features)
        offsets = nn.Conv(
            self.factor**2 * groups * 2,
            (1, 1),
            kernel_init=nn.initializers.normal(0.001),
            dtype=self.dtype,
            name="offset",
        )(x)
        offsets = SCOPE * pixel_shuffle(offsets, self.factor).astype(jnp.float32)
        b, height, width, _ = offsets.shape
        offsets = offsets.reshape(b, height, width, groups, 2)
        # Output pixel centers, in input pixels from the center of the first input pixel.
        row, column = ((jnp.arange(n) + 0.5) / self.factor - 0.5 for n in (height, width))
        rows = row[None, :, None, None] + offsets[..., 0]
        columns = column[None, None, :, None] + offsets[..., 1]
        return sample(x, rows, columns)


# Without the checkpoint, the backward pass would store the four pixels around each position.
@jax.checkpoint
def sample(
    x: Float[Array, "b h w c"], rows: Float[Array, "b H W g"], columns: Float[Array, "b H W g"]
) -> Float[Array, "b H W c"]:
    """Samples x bilinearly, at one position for each output pixel and group of channels.

    Each of the g groups has c / g adjacent channels. `rows` and `columns` are positions in pixels
    from the center of the first pixel. A position outside x is moved to the closest border pixel.
    """
    b, h, w, channels = x.shape
    _, height, width, groups = rows.shape
    pixels = x.reshape(b, h * w, groups, channels // groups)
    rows = jnp.minimum(jnp.maximum(rows, 0), h - 1)
    columns = jnp.minimum(jnp.maximum(columns, 0), w - 1)
    top, left = (jnp.floor(positions).astype(jnp.int32) for positions in (rows, columns))

    def corner(row, column):
        """Returns the values at one of the four surrounding pixels, times the pixel's weight."""
        weight = (1 - jnp.abs(rows - row)) * (1 - jnp.abs(columns - column))
        index = jnp.minimum(row, h - 1) * w + jnp.minimum(column, w - 1)
        index = index.reshape(b, height * width, groups, 1)
        values = jnp.take_along_axis(pixels, index, axis=1, mode="clip")
        return weight[..., None] * values.reshape(b, height, width, groups, -1)

    y = corner(top, left) + corner(top, left + 1) + corner(top + 1, left)
    y += corner(top + 1, left + 1)
    return y.astype(x.dtype).reshape(b, height, width, channels)
