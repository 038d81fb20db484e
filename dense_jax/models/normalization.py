"""Methods to normalize an image for the network, selected by `model.normalization`.

`to_gray_levels` maps the values of an image to gray levels, of which 0 is black and 255 is white.
Each function in NORMALIZATIONS then maps gray levels [..., c] to float32 [..., d]. For "image",
"percentiles" and "dataset", gray levels are measured (see `data.levels`), and `unit` maps them. With
"image" and "dataset", the network's input is (x - mean) / sd.

The functions for published weights convert a gray image to three equal channels. The network then
computes the same as if its first kernels were summed over R, G and B.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def to_gray_levels(image: Array, levels: Array | None = None) -> Array:
    """Returns (image - low) * 255 / (high - low), not clipped, with low and high = levels.

    image: [*b, h, w, c], of any dtype. levels: [*b, 2, c]. If None, the image holds gray levels
      already.
    """
    if levels is None:
        return image
    low, high = (levels[..., i, None, None, :] for i in (0, 1))
    return (image - low) * (255 / (high - low))


def unit(image: Array) -> Float[Array, "*shape"]:
    """Maps 0..255 to -2..2, which gives approximately unit variance."""
    return image.astype(jnp.float32) / 63.75 - 2.0


def standardize(mean: Sequence[float], std: Sequence[float]) -> Callable[[Array], Array]:
    """Returns a function that computes (image / 255 - mean) / std for the channels R, G and B.

    A gray image becomes an image of three equal channels. Any other image keeps its channels,
    which use the mean and std of R, G, B, R, G and so on.
    """

    def normalize(image: Array) -> Float[Array, "*shape d"]:
        channels = 3 if image.shape[-1] == 1 else image.shape[-1]
        unit_range = jnp.broadcast_to(image / 255.0, (*image.shape[:-1], channels))
        shape = (1,) * (image.ndim - 1) + (channels,)
        mean_of, std_of = (jnp.array(np.resize(x, shape), jnp.float32) for x in (mean, std))
        return (unit_range - mean_of) / std_of

    return normalize


def local_response(image: Array) -> Float[Array, "*shape"]:
    """Returns x / (1 + alpha / 5 * sum of x^2 over the channels)^0.75 with alpha = 1e-4.

    x is the image with values from 0 to 255. The formula is SegNet-Basic's local response
    normalization, whose window of 5 channels covers all channels of an image.
    """
    x = image.astype(jnp.float32)
    return x / (1 + 1e-4 / 5 * jnp.sum(x**2, axis=-1, keepdims=True)) ** 0.75


NORMALIZATIONS: dict[str, Callable[[Array], Array]] = {
    "unit": unit,
    "imagenet": standardize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "inception": standardize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "local_response": local_response,
    "image": unit,
    "percentiles": unit,
    "dataset": unit,
}
