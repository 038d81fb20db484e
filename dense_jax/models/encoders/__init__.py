"""Encoders: the `model.encoder` axis.

Every encoder is a Module called `encoder(image, train=...)` with image [b, h, w, c], h and w
multiples of its deepest stride. It is made with `widths` (channels at strides 1, 2, 4, ...), `norm`
and `dtype`, and has `strides`, those of its features in increasing order. It returns a
`layers.Pyramid`. To add one, write a file here and a line in ENCODERS.
"""

from collections.abc import Callable

from flax import linen as nn

from dense_jax.models.encoders.plain import Plain

ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "plain": Plain,
}
