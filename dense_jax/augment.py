"""Random geometry on the device: image and label move together, in one resample per image.

`augment(key, example)` maps one example on its padded canvas to a crop. All transformations compose
into one map from output to input pixels; the image is read there bilinearly, the label, and the
border weight that belongs to it, at the nearest pixel, so no label value is ever made up. Outside
the image the label is IGNORE_LABEL and the image mirrored, which is also what evaluation shows the
network beyond the border. The result depends on the example's key alone, not on its batch.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num, UInt8

from dense_jax.labels import IGNORE_LABEL

Coordinates = tuple[Float[Array, "h w"], Float[Array, "h w"]]


def make_augment(
    crop_size: Sequence[int],
    *,
    context: int = 0,
    resolution: float = 1.0,
    flip: float = 0.0,
    flip_vertical: float = 0.0,
    scale: float = 0.0,
) -> Callable:
    """Returns augment(key, example) -> {"image": float [hi, wi, c], "label": int32 [h, w]}.

    An example holds `image` uint8 [H, W, c], `label` uint8 [H, W] and `size` int32 [2], the height
    and width in pixels that hold it; its `border` float32 [H, W], if any, comes out [h, w].

    crop_size: height and width of the label, in pixels.
    context: by how many pixels the image is larger than the label on every side.
    resolution: of the result relative to the example's, e.g. 0.5 to halve height and width.
    flip, flip_vertical: probability of a left-right and a top-bottom flip.
    scale: the zoom is log-uniform in [1 / (1 + scale), 1 + scale].
    """
    height, width = crop_size
    middle = (slice(context, context + height), slice(context, context + width))

    def augment(key: Key[Array, ""], example: Mapping[str, Array]) -> dict[str, Array]:
        size = example["size"]
        key_zoom, key_flip, key_vertical, key_crop = jax.random.split(key, 4)
        limit = jnp.log1p(scale)
        zoom = resolution * jnp.exp(jax.random.uniform(key_zoom, (), minval=-limit, maxval=limit))
        y, x = (jnp.arange(-context, length + context) + 0.5 for length in crop_size)
        x = jnp.where(jax.random.bernoulli(key_flip, flip), width - x, x)
        y = jnp.where(jax.random.bernoulli(key_vertical, flip_vertical), height - y, y)
        # The window lies inside an image that is larger, and holds all of one that is smaller.
        free = size - jnp.array([height, width]) / zoom  # in input pixels
        start = jnp.floor(jax.random.uniform(key_crop, (2,)) * (jnp.abs(free) + 1))
        top, left = start * jnp.sign(free)
        y, x = jnp.meshgrid(y / zoom + top - 0.5, x / zoom + left - 0.5, indexing="ij")
        at = y[middle], x[middle]
        crop = {
            "image": sample_bilinear(example["image"], (mirror(y, size[0]), mirror(x, size[1]))),
            "label": sample_nearest(example["label"], at, size, IGNORE_LABEL).astype(jnp.int32),
        }
        if "border" in example:
            crop["border"] = sample_nearest(example["border"], at, size, 0)
        return crop

    return augment


def mirror(position: Float[Array, "h w"], size: Int[Array, ""]) -> Float[Array, "h w"]:
    """Reflects positions, in pixels, into [0, size - 1] about the centres of the border pixels."""
    last = (size - 1).astype(jnp.float32)
    return last - jnp.abs(jnp.mod(position, jnp.maximum(2 * last, 1.0)) - last).clip(0, last)


def sample_bilinear(image: UInt8[Array, "H W c"], at: Coordinates) -> Float[Array, "h w c"]:
    """Reads the image between pixels; exact where the coordinates are whole."""
    y, x = at
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = (y - top)[..., None], (x - left)[..., None]
    y0, x0 = top.astype(jnp.int32), left.astype(jnp.int32)
    y1 = jnp.minimum(y0 + 1, image.shape[0] - 1)  # there, its weight is 0
    x1 = jnp.minimum(x0 + 1, image.shape[1] - 1)
    upper = (1 - right) * image[y0, x0] + right * image[y0, x1]
    lower = (1 - right) * image[y1, x0] + right * image[y1, x1]
    return (1 - down) * upper + down * lower


def sample_nearest(
    values: Num[Array, "H W"], at: Coordinates, size: Int[Array, "2"], outside: int
) -> Num[Array, "h w"]:
    """Reads the nearest pixel; `outside` beyond the valid size."""
    y, x = (jnp.floor(position + 0.5).astype(jnp.int32) for position in at)
    inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    return jnp.where(inside, values[y, x], outside)
