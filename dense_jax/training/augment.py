"""Random geometry on the device: image and label move together, in one resample per array.

`augment(key, example)` maps one example on its padded canvas to a crop. All transformations compose
into one map from output to input pixels. There the image, and the border weight that belongs to the
label, are read bilinearly, the label at the nearest pixel, so that no label value is ever made up.
Outside the image the label is IGNORE_LABEL and the image mirrored, which is also what evaluation
shows the network beyond the border; border weights are 0 where the label is ignored. Then the image
alone changes its colors (`color`). The result depends on the example's key alone, not on its
batch, and what has strength 0 is not computed.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num, UInt8

from dense_jax.geometry import reflect
from dense_jax.labels import IGNORE_LABEL
from dense_jax.training.color import make_color

ELASTIC_POINTS = 3  # of the displacement grid, along each axis, as in the U-Net paper
NUM_CANDIDATES = 10  # windows to choose from, as MMSegmentation tries
NUM_SAMPLES = 32  # pixels along each axis by which a window is judged

Coordinates = tuple[Float[Array, "h w"], Float[Array, "h w"]]


def make_augment(
    crop_size: Sequence[int],
    *,
    context: int = 0,
    resolution: float = 1.0,
    flip: float = 0.0,
    flip_vertical: float = 0.0,
    scale: float = 0.0,
    rotation: float = 0.0,
    shear: float = 0.0,
    elastic: float = 0.0,
    max_class_fraction: float = 1.0,
    **colors: float,
) -> Callable:
    """Returns augment(key, example) -> {"image": float [hi, wi, c], "label": int32 [h, w]}.

    An example holds `image` uint8 [H, W, c], `label` uint8 [H, W] and `size` int32 [2], the height
    and width in pixels that hold it; its `border` float32 [H, W], if any, comes out [h, w].

    crop_size: height and width of the label, in pixels.
    context: by how many pixels the image is larger than the label on every side.
    resolution: of the result relative to the example's, e.g. 0.5 to halve height and width.
    flip, flip_vertical: probability of a left-right and a top-bottom flip.
    scale: the zoom is log-uniform in [1 / (1 + scale), 1 + scale].
    rotation: degrees; the angle about the crop's middle is uniform in [-rotation, rotation].
    shear: degrees; vertical lines lean by an angle uniform in [-shear, shear].
    elastic: standard deviation, in pixels of the result, of Gaussian displacements of a 3 x 3 grid
        of points over it; of the pixels between them by bicubic splines (U-Net paper, section 3.1).
    max_class_fraction: below 1, the crop is the first of 10 random windows in which every class has
        less than this fraction of the valid pixels, or else the last of them.
    colors: strengths of color.COLORS.
    """
    height, width = crop_size
    middle = (slice(context, context + height), slice(context, context + width))
    coarse = np.ix_(
        *(context + np.linspace(0, n - 1, min(n, NUM_SAMPLES)).astype(int) for n in crop_size)
    )
    change_colors = make_color(**colors)

    def augment(key: Key[Array, ""], example: Mapping[str, Array]) -> dict[str, Array]:
        size = example["size"]
        key_zoom, key_flip, key_vertical, key_crop, *others = jax.random.split(key, 8)
        key_rotation, key_shear, key_elastic, key_color = others
        # From the crop's middle, so that it stays where it is.
        y, x = jnp.meshgrid(
            *(jnp.arange(-context, n + context) + (1 - n) / 2 for n in crop_size), indexing="ij"
        )
        if elastic:
            points = elastic * jax.random.normal(key_elastic, (2, ELASTIC_POINTS, ELASTIC_POINTS))
            down, right = displacements(points, *y.shape)
            y, x = y + down, x + right
        if flip:
            x = jnp.where(jax.random.bernoulli(key_flip, flip), -x, x)
        if flip_vertical:
            y = jnp.where(jax.random.bernoulli(key_vertical, flip_vertical), -y, y)
        if shear:
            angle = jax.random.uniform(key_shear, (), minval=-shear, maxval=shear)
            x = x + jnp.tan(jnp.deg2rad(angle)) * y
        if rotation:
            angle = jax.random.uniform(key_rotation, (), minval=-rotation, maxval=rotation)
            y, x = rotate((y, x), angle)
        zoom = jnp.float32(resolution)
        if scale:
            limit = np.log1p(scale)
            zoom *= jnp.exp(jax.random.uniform(key_zoom, (), minval=-limit, maxval=limit))
        y, x = y / zoom, x / zoom
        # The window lies inside an image that is larger, and holds all of one that is smaller.
        window = jnp.array([height, width]) / zoom  # in input pixels
        free = size - window
        candidates = NUM_CANDIDATES if max_class_fraction < 1 else 1
        places = jax.random.uniform(key_crop, (candidates, 2))
        start = jnp.floor(places * (jnp.abs(free) + 1)[None]) * jnp.sign(free)[None]
        centers = start + (window / 2 - 0.5)[None]
        chosen = 0
        if max_class_fraction < 1:
            at = y[coarse], x[coarse]
            chosen = first_mixed(example["label"], at, size, centers, max_class_fraction)
        y, x = y + centers[chosen, 0], x + centers[chosen, 1]

        mirrored = mirror(y, size[0]), mirror(x, size[1])
        label = sample_nearest(example["label"], (y[middle], x[middle]), size, IGNORE_LABEL)
        image = change_colors(key_color, sample_bilinear(example["image"], mirrored))
        crop = {"image": image, "label": label.astype(jnp.int32)}
        if "border" in example:
            at = mirrored[0][middle], mirrored[1][middle]
            border = sample_bilinear(example["border"][..., None], at)[..., 0]
            crop["border"] = jnp.where(label == IGNORE_LABEL, 0, border)
        return crop

    return augment


def first_mixed(
    label: UInt8[Array, "H W"],
    at: Coordinates,
    size: Int[Array, "2"],
    centers: Float[Array, "n 2"],
    max_class_fraction: float,
) -> Int[Array, ""]:
    """The first of the windows around `centers` that is not of one class, or else the last."""

    def is_mixed(center: Float[Array, "2"]) -> Bool[Array, ""]:
        seen = sample_nearest(label, (at[0] + center[0], at[1] + center[1]), size, IGNORE_LABEL)
        counts = jnp.bincount(seen.ravel(), length=IGNORE_LABEL + 1)[:IGNORE_LABEL]
        return counts.max() < max_class_fraction * counts.sum()

    return jnp.argmax(jax.vmap(is_mixed)(centers).at[-1].set(True))


def displacements(
    points: Float[Array, "k p q"], height: int, width: int
) -> Float[Array, "k {height} {width}"]:
    """Cubic splines through p x q points whose outermost lie on the outermost pixels.

    The slope is 0 at the border: scipy.ndimage.zoom with order=3 and mode="mirror" is the same.
    """
    from scipy.interpolate import CubicSpline  # long to import, and off by default

    rows, columns = (
        # What a displacement of 1 at each point does to each pixel.
        CubicSpline(np.arange(p), np.eye(p), bc_type="clamped")(np.linspace(0, p - 1, n))
        for p, n in zip(points.shape[1:], (height, width), strict=True)
    )
    return jnp.einsum("yp,kpq,xq->kyx", rows, points, columns, precision="highest")


def rotate(at: Coordinates, degrees: Float[Array, ""] | float) -> Coordinates:
    """About (0, 0). Reading there turns the picture anticlockwise."""
    y, x = at
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    return cos * y + sin * x, cos * x - sin * y


def mirror(position: Float[Array, "h w"], size: Int[Array, ""]) -> Float[Array, "h w"]:
    """Reflects positions, in pixels, into [0, size - 1] about the centers of the border pixels."""

    def modulo(position: Array, period: Array) -> Array:  # far faster than % on a CPU
        return position - period * jnp.floor(position / period)

    return reflect(position, size, modulo).clip(0)


def sample_bilinear(image: Num[Array, "H W c"], at: Coordinates) -> Float[Array, "h w c"]:
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
