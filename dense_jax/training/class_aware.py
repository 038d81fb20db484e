"""Crops around random classes, and ClassMix, so that a network sees rare classes more often.

Both count classes instead of pixels: a class of few pixels is drawn as often as one of many.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Key, Num

Coordinates = tuple[Float[Array, "h w"], Float[Array, "h w"]]


def class_center(
    key: Key[Array, ""],
    label: Integer[Array, "H W"],
    at: Coordinates,
    window: Float[Array, "2"],
    size: Int[Array, "2"],
    num_classes: int,
    otherwise: Float[Array, "2"],
) -> Float[Array, "2"]:
    """Returns the center of a crop window that shows a random pixel of a random class.

    The class is drawn from those in the image, with equal probabilities, then one of its pixels,
    then one of the windows inside the image that show the pixel. So the pixel is equally likely to
    be anywhere in the crop, unless it is closer to the image's border than the window is long. If
    no window shows the pixel, or if all pixels are ignored, returns `otherwise`.

    at: The positions that the crop reads, in pixels of the image from the window's center.
    window: The height and width of the window, in pixels of the image.
    """
    class_key, pixel_key, place_key = jax.random.split(key, 3)
    is_shown = masks(label, num_classes).any(axis=(1, 2))
    _, chosen = random_pixel(class_key, is_shown[None])
    pixel = random_pixel(pixel_key, label == chosen)
    # An element for each place in the crop: is the window that shows the pixel there allowed?
    allowed = jnp.ones(at[0].shape, bool)
    for axis, n in enumerate(at[0].shape):
        shift = pixel[axis] - at[axis] - (size[axis] - 1) / 2  # from the middle of the image
        half_step = window[axis] / n / 2  # without it, rounding could exclude all windows
        allowed &= jnp.abs(shift) <= jnp.abs(size[axis] - window[axis]) / 2 + half_step
    place = random_pixel(place_key, allowed)
    center = jnp.stack(pixel) - jnp.stack([positions[place] for positions in at])
    # Like other windows, this one starts at a whole pixel, so that it is resampled like them. The
    # chosen pixel remains the nearest at its place.
    corner = window / 2 - 0.5
    center = jnp.ceil(center - corner - 0.5) + corner
    return jnp.where(is_shown.any() & allowed.any(), center, otherwise)


def mix_classes(
    keys: Key[Array, " b"],
    crops: Mapping[str, Num[Array, "b ..."]],
    probability: float,
    num_classes: int,
) -> dict[str, Array]:
    """Pastes half of the classes of the next crop of the batch into each crop.

    ClassMix (Olsson et al. 2021, arXiv 2007.07936, algorithm 1) with labels instead of predictions.
    Of n classes, n // 2 are drawn with equal probabilities. All their pixels replace those of the
    crop, in the image, the label and the fields. Ignored pixels are not pasted. The pixels around
    the label, which unpadded convolutions need, remain.

    crops: `image`, `label` and fields, as returned by `augment` for each example.
    probability: The probability that a crop is changed.
    """
    following = jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), dict(crops))

    def draw(key: Key[Array, ""], label: Int[Array, "h w"]) -> Bool[Array, " c"]:
        own_key, order_key = jax.random.split(key)
        is_shown = masks(label, num_classes).any(axis=(1, 2))
        order = jnp.where(is_shown, jax.random.uniform(order_key, (num_classes,)), 1)
        number = is_shown.sum() // 2 * jax.random.bernoulli(own_key, probability)
        return order < jnp.sort(order)[number]

    def paste(
        crops: dict[str, Array], following: dict[str, Array], drawn: Bool[Array, "b c"]
    ) -> dict[str, Array]:
        pasted = jax.vmap(masks, in_axes=(0, None))(following["label"], num_classes)
        pasted = (pasted & drawn[..., None, None]).any(axis=1)
        context = (crops["image"].shape[1] - pasted.shape[1]) // 2
        around = jnp.pad(pasted, ((0, 0), (context, context), (context, context)))
        return {
            name: jnp.where(
                jnp.expand_dims(around if name == "image" else pasted, range(3, values.ndim)),
                following[name],
                values,
            )
            for name, values in crops.items()
        }

    drawn = jax.vmap(draw)(keys, following["label"])
    # The condition also makes XLA store the crops. On a CPU, it would otherwise sample them again
    # for each use, which takes 30 times as long.
    return jax.lax.cond(drawn.any(), paste, lambda crops, *_: crops, dict(crops), following, drawn)


def masks(label: Integer[Array, "h w"], num_classes: int) -> Bool[Array, "c h w"]:
    """Returns the pixels of each class."""
    return label[None] == jnp.arange(num_classes, dtype=label.dtype)[:, None, None]


def random_pixel(
    key: Key[Array, ""], mask: Bool[Array, "h w"]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Returns the row and the column of a pixel of the mask, drawn with equal probabilities."""
    in_row = mask.sum(axis=1)
    ends = jnp.cumsum(in_row)
    number = jax.random.randint(key, (), 0, ends[-1])  # of the pixel, counted in reading order
    row = jnp.argmax(ends > number)
    column = jnp.argmax(jnp.cumsum(mask[row]) > number - ends[row] + in_row[row])
    return row, column
