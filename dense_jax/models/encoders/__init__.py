"""Encoders: the `model.encoder` axis.

Every encoder is a Module called `encoder(image, train=...)` with image [b, h, w, c], h and w
multiples of its deepest stride. It returns a `layers.Pyramid` and has `strides`, the keys of the
pyramid's features in increasing order. To add one, write a file here and a line in ENCODERS.
"""

from collections.abc import Callable

from flax import linen as nn

from dense_jax.models.encoders.plain import Plain

ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "plain": Plain,
}
