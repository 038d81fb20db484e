"""Random geometric augmentation on the device.

`augment` turns one example, padded to the canvas, into a random crop. All transformations compose
into one map from output to input positions, so each array is resampled only once. The image is
sampled bilinearly, and the label from the nearest pixel. Beyond the border of the image, the image
is mirrored, as in evaluation, and the label is IGNORE_LABEL. Finally, `color_jitter` changes the
colors of the image. The result depends only on the example and its key, not on the batch.
`augment_batch` may then mix the crops of a batch.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, Num, UInt8

from dense_jax.data import Field
from dense_jax.geometry import reflect
from dense_jax.labels import IGNORE_LABEL
from dense_jax.models.normalization import to_gray_levels
from dense_jax.training.class_aware import Coordinates, class_center, mix_classes
from dense_jax.training.color_jitter import change_colors

ELASTIC_POINTS = 3  # points of the displacement grid along each axis, as in the U-Net paper
NUM_CANDIDATES = 10  # windows to choose from, as in MMSegmentation
NUM_SAMPLES = 32  # pixels sampled along each axis to judge a window
# The random draws whose keys are split from the example's key. Any other transformation folds its
# position in GEOMETRY into the example's key, so adding a transformation changes no other draws.
KEYS = (
    *("scale", "flip", "flip_vertical", "crop", "rotation", "shear", "elastic", "color"),
    *("class_crop", "class_mix"),
)


def augment_batch(
    keys: Key[Array, " b"],
    batch: Mapping[str, Array],
    *,
    num_classes: int,
    class_mix: float = 0.0,
    **options: Any,
) -> dict[str, Array]:
    """Returns a random crop of each example of a batch, mixed with the next; see `mix_classes`.

    class_mix: The probability that a crop is mixed.
    options: The options of `augment`.
    """
    crop = functools.partial(augment, num_classes=num_classes, **options)
    crops = jax.vmap(crop)(keys, batch)
    if class_mix:
        own_keys = jax.vmap(lambda key: jax.random.split(key, len(KEYS))[KEYS.index("class_mix")])
        crops = mix_classes(own_keys(keys), crops, class_mix, num_classes)
    return crops


def augment(
    key: Key[Array, ""],
    example: Mapping[str, Array],
    *,
    crop_size: Sequence[int],
    context: int = 0,
    resolution: float = 1.0,
    scale: float = 0.0,
    max_class_fraction: float = 1.0,
    class_crop: float = 0.0,
    num_classes: int = IGNORE_LABEL,
    fields: Sequence[Field] = (),
    clip: bool = True,
    **strengths: float,
) -> dict[str, Array]:
    """Returns a random crop of the image, the label and the additional fields of an example.

    With (h, w) = crop_size, the result holds `image` float [h + 2 * context, w + 2 * context, c],
    `label` int32 [h, w], and the fields [h, w, ...].

    The image holds gray levels, 0 to 255; see `to_gray_levels`.

    example: The padded arrays `image` [H, W, c], `label` uint8 [H, W] and fields [H, W, ...];
      `size` int32 [2], the height and width without the padding; and, if images have them, `levels`.
    context: The number of pixels by which the cropped image extends beyond its label on every side.
    resolution: The factor by which the example is resized before cropping.
    scale: The strength of the zoom. The zoom factor is drawn log-uniformly from
      [1 / (1 + scale), 1 + scale].
    max_class_fraction: If below 1, draws 10 random windows and crops the first one in which every
      class covers less than this fraction of the valid pixels. If there is none, crops the last.
    class_crop: The probability that the crop shows a random pixel of a random class instead; see
      `class_center`.
    num_classes: The number of classes, for `class_crop`.
    fields: The additional per-pixel targets. Where the cropped label is IGNORE_LABEL, a cropped
      field has the value `Field.fill`.
    clip: Whether gray levels below 0 and above 255 are impossible; see `change_colors`.
    strengths: The strengths of entries of GEOMETRY and COLORS, by name. The default is 0 (off).
    """
    keys = dict(zip(KEYS, jax.random.split(key, len(KEYS)), strict=True))
    # Positions relative to the center of the crop, about which the crop is rotated and flipped.
    y, x = jnp.meshgrid(
        *(jnp.arange(-context, n + context) + (1 - n) / 2 for n in crop_size), indexing="ij"
    )
    for number, (name, transform) in enumerate(GEOMETRY.items()):
        if strength := strengths.get(name):
            own_key = keys[name] if name in keys else jax.random.fold_in(key, number)
            y, x = transform(own_key, strength, (y, x))
    zoom = jnp.float32(resolution)
    if scale:
        limit = np.log1p(scale)
        zoom *= jnp.exp(jax.random.uniform(keys["scale"], (), minval=-limit, maxval=limit))
    y, x = y / zoom, x / zoom
    size = example["size"]
    centers = window_centers(
        keys["crop"], crop_size, zoom, size, NUM_CANDIDATES if max_class_fraction < 1 else 1
    )
    chosen = 0
    if max_class_fraction < 1:
        sampled = np.ix_(
            *(context + np.linspace(0, n - 1, min(n, NUM_SAMPLES)).astype(int) for n in crop_size)
        )
        samples = y[sampled], x[sampled]
        chosen = first_mixed(example["label"], samples, size, centers, max_class_fraction)
    center = centers[chosen]
    inner = tuple(slice(context, context + n) for n in crop_size)
    if class_crop:
        own_key, class_key = jax.random.split(keys["class_crop"])
        window, at = jnp.array(crop_size) / zoom, (y[inner], x[inner])
        around = class_center(class_key, example["label"], at, window, size, num_classes, center)
        center = jnp.where(jax.random.bernoulli(own_key, class_crop), around, center)
    y, x = y + center[0], x + center[1]

    mirrored = mirror(y, size[0]), mirror(x, size[1])
    label_at = y[inner], x[inner]
    # Without these, rows stay rows and columns stay columns.
    is_separable = not any(strengths.get(name) for name in ("elastic", "shear", "rotation"))
    label = sample_nearest(example["label"], label_at, size, IGNORE_LABEL, is_separable)
    image = sample_bilinear(example["image"], mirrored, is_separable)
    image = to_gray_levels(image, example.get("levels"))
    image = change_colors(keys["color"], image, strengths, clip)
    crop = {"image": image, "label": label.astype(jnp.int32)}
    for field in fields:
        values = example[field.name]
        if field.interpolation == "nearest":
            values = sample_nearest(values, label_at, size, field.fill)
        else:
            positions = mirrored[0][inner], mirrored[1][inner]
            flat = sample_bilinear(values.reshape(*values.shape[:2], -1), positions)
            values = flat.reshape(*label.shape, *field.shape)
        ignored = (label == IGNORE_LABEL).reshape(*label.shape, *(1 for _ in field.shape))
        crop[field.name] = jnp.where(ignored, field.fill, values)
    return crop


def window_centers(
    key: Key[Array, ""],
    crop_size: Sequence[int],
    zoom: Float[Array, ""],
    size: Int[Array, "2"],
    num_windows: int,
) -> Float[Array, "n 2"]:
    """Returns the centers of random crop windows, in pixel coordinates of the image.

    A window covers crop_size / zoom image pixels. Along each axis, the window lies inside the image
    to within a pixel. If the window is larger, the image lies inside the window instead.
    """
    window = jnp.array(crop_size) / zoom  # in pixels of the image
    free = size - window
    places = jax.random.uniform(key, (num_windows, 2))
    start = jnp.floor(places * (jnp.abs(free) + 1)[None]) * jnp.sign(free)[None]
    return start + (window / 2 - 0.5)[None]


def first_mixed(
    label: UInt8[Array, "H W"],
    at: Coordinates,
    size: Int[Array, "2"],
    centers: Float[Array, "n 2"],
    max_class_fraction: float,
) -> Int[Array, ""]:
    """Returns the index of the first window without a dominant class.

    If every window has a dominant class, returns the last index. A class is dominant if it covers
    at least max_class_fraction of the valid pixels.

    at: The positions to sample in each window, relative to the window's center.
    """

    def is_mixed(center: Float[Array, "2"]) -> Bool[Array, ""]:
        seen = sample_nearest(label, (at[0] + center[0], at[1] + center[1]), size, IGNORE_LABEL)
        counts = jnp.bincount(seen.ravel(), length=IGNORE_LABEL + 1)[:IGNORE_LABEL]
        return counts.max() < max_class_fraction * counts.sum()

    return jnp.argmax(jax.vmap(is_mixed)(centers).at[-1].set(True))


def elastic(key: Key[Array, ""], strength: float, at: Coordinates) -> Coordinates:
    """Deforms the crop smoothly, with cubic splines through a 3 x 3 grid of random displacements.

    strength: The standard deviation of the Gaussian displacements, in pixels of the crop (U-Net
      paper, section 3.1).
    """
    points = strength * jax.random.normal(key, (2, ELASTIC_POINTS, ELASTIC_POINTS))
    down, right = displacements(points, *at[0].shape)
    return at[0] + down, at[1] + right


def flip(key: Key[Array, ""], probability: float, at: Coordinates) -> Coordinates:
    """Flips the crop horizontally with the given probability."""
    return at[0], jnp.where(jax.random.bernoulli(key, probability), -at[1], at[1])


def flip_vertical(key: Key[Array, ""], probability: float, at: Coordinates) -> Coordinates:
    """Flips the crop vertically with the given probability."""
    return jnp.where(jax.random.bernoulli(key, probability), -at[0], at[0]), at[1]


def shear(key: Key[Array, ""], degrees: float, at: Coordinates) -> Coordinates:
    """Shears the crop. Vertical lines lean by an angle drawn uniformly from [-degrees, degrees]."""
    angle = jax.random.uniform(key, (), minval=-degrees, maxval=degrees)
    return at[0], at[1] + jnp.tan(jnp.deg2rad(angle)) * at[0]


def rotation(key: Key[Array, ""], degrees: float, at: Coordinates) -> Coordinates:
    """Rotates the crop about its center by an angle drawn uniformly from [-degrees, degrees]."""
    return rotate(at, jax.random.uniform(key, (), minval=-degrees, maxval=degrees))


# Each entry is called as (key, strength, positions) and returns the positions to read from, in
# pixels from the center of the crop. The entries are applied in this order.
GEOMETRY: dict[str, Callable[..., Coordinates]] = {
    "elastic": elastic,
    "flip": flip,
    "flip_vertical": flip_vertical,
    "shear": shear,
    "rotation": rotation,
}


def displacements(
    points: Float[Array, "k p q"], height: int, width: int
) -> Float[Array, "k {height} {width}"]:
    """Interpolates each p x q grid of values to height x width with cubic splines.

    The corner points of the grid fall on the corner pixels, and the slope is 0 at the border.
    Equivalent to scipy.ndimage.zoom(order=3, mode="mirror").
    """
    from scipy.interpolate import CubicSpline  # slow to import, and `elastic` is off by default

    rows, columns = (
        # Spline weights: the value at each pixel if one grid point is 1 and all others are 0.
        CubicSpline(np.arange(p), np.eye(p), bc_type="clamped")(np.linspace(0, p - 1, n))
        for p, n in zip(points.shape[1:], (height, width), strict=True)
    )
    return jnp.einsum("yp,kpq,xq->kyx", rows, points, columns, precision="highest")


def rotate(at: Coordinates, degrees: Float[Array, ""] | float) -> Coordinates:
    """Rotates positions about (0, 0). An image sampled at the results turns counterclockwise."""
    y, x = at
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    return cos * y + sin * x, cos * x - sin * y


def mirror(position: Float[Array, "h w"], size: Int[Array, ""]) -> Float[Array, "h w"]:
    """Mirrors positions at the centers of the border pixels, so that they lie in [0, size - 1]."""

    def modulo(position: Array, period: Array) -> Array:  # far faster than % on a CPU
        return position - period * jnp.floor(position / period)

    return reflect(position, size, modulo).clip(0)


def sample_bilinear(
    image: Num[Array, "H W c"], at: Coordinates, is_separable: bool = False
) -> Float[Array, "h w c"]:
    """Samples an image with bilinear interpolation. The result is exact at integer coordinates.

    is_separable: Whether y is the same in all columns and x in all rows. On a TPU, two matrix
      products then replace gathers, which take far more cycles; see benchmarks/tpu.md.
    """
    if not is_separable:
        return bilinear_by_gathers(image, *at)
    return jax.lax.platform_dependent(
        image, *at, tpu=bilinear_by_products, default=bilinear_by_gathers
    )


def bilinear_by_gathers(
    image: Num[Array, "H W c"], y: Float[Array, "h w"], x: Float[Array, "h w"]
) -> Float[Array, "h w c"]:
    """Interpolates between four pixels of each position."""
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = (y - top)[..., None], (x - left)[..., None]
    y0, x0 = top.astype(jnp.int32), left.astype(jnp.int32)
    y1 = jnp.minimum(y0 + 1, image.shape[0] - 1)  # where this clips, the weight is 0
    x1 = jnp.minimum(x0 + 1, image.shape[1] - 1)
    upper = (1 - right) * image[y0, x0] + right * image[y0, x1]
    lower = (1 - right) * image[y1, x0] + right * image[y1, x1]
    return (1 - down) * upper + down * lower


def bilinear_by_products(
    image: Num[Array, "H W c"], y: Float[Array, "h w"], x: Float[Array, "h w"]
) -> Float[Array, "h w c"]:
    """Multiplies the image by the weights of all rows and of all columns."""
    rows, columns = (
        jnp.maximum(0, 1 - jnp.abs(position[:, None] - jnp.arange(n)[None]))
        for position, n in zip((y[:, 0], x[0]), image.shape[:2], strict=True)
    )
    image = image.astype(rows.dtype)
    return jnp.einsum("yh,hwc,xw->yxc", rows, image, columns, precision="highest")


def sample_nearest(
    values: Num[Array, "H W"],
    at: Coordinates,
    size: Int[Array, "2"],
    outside: ArrayLike,
    is_separable: bool = False,
) -> Num[Array, "h w"]:
    """Samples the nearest pixels. Positions outside the valid `size` get the value `outside`.

    is_separable: As in `sample_bilinear`. The values must then be of 8 bits.
    """
    y, x = (jnp.floor(position + 0.5).astype(jnp.int32) for position in at)
    inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    if is_separable:
        sampled = jax.lax.platform_dependent(
            values, y, x, tpu=pick_by_products, default=lambda values, y, x: values[y, x]
        )
    else:
        sampled = values[y, x]
    return jnp.where(inside, sampled, outside)


def pick_by_products(
    values: UInt8[Array, "H W"], y: Int[Array, "h w"], x: Int[Array, "h w"]
) -> UInt8[Array, "h w"]:
    """Returns values[y, x], by products with matrices of zeros and ones.

    The result is exact, because each sum has one term, and bfloat16 holds all integers up to 256.
    """
    rows, columns = (
        jax.nn.one_hot(index, n, dtype=jnp.bfloat16)
        for index, n in zip((y[:, 0], x[0]), values.shape, strict=True)
    )
    picked = jnp.einsum("yh,hw,xw->yx", rows, values.astype(jnp.bfloat16), columns)
    return picked.astype(values.dtype)
