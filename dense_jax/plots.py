"""Pictures of labels: colours, overlays, rows of input | truth | prediction, contact sheets.

Matplotlib is long to import, and most commands need none of it: the functions that do import it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from dense_jax.labels import IGNORE_LABEL

if TYPE_CHECKING:
    import matplotlib.figure

IGNORED_COLOUR = (255, 255, 255)


def default_palette(num_classes: int) -> UInt8[np.ndarray, "classes 3"]:
    """Okabe and Ito's eight colour-blind-safe colours; evenly spaced hues where more are needed."""
    okabe_ito = ["000000", "E69F00", "56B4E9", "009E73", "F0E442", "0072B2", "D55E00", "CC79A7"]
    if num_classes <= len(okabe_ito):
        return np.array([list(bytes.fromhex(c)) for c in okabe_ito[:num_classes]], np.uint8)
    from matplotlib import colormaps

    colours = colormaps["turbo"](np.linspace(0, 1, num_classes))
    return (255 * colours[:, :3]).astype(np.uint8)


def palette_of(source: Any) -> UInt8[np.ndarray, "classes 3"]:
    """The dataset's own colours, or ours."""
    return default_palette(source.num_classes) if source.palette is None else source.palette


def colourise(
    labels: Int[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"],
    palette: UInt8[np.ndarray, "classes 3"],
) -> UInt8[np.ndarray, "h w 3"]:
    """Class ids to colours; IGNORE_LABEL is white."""
    table = np.full((IGNORE_LABEL + 1, 3), IGNORED_COLOUR, np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def indexed(
    labels: UInt8[np.ndarray, "h w"], palette: UInt8[np.ndarray, "classes 3"]
) -> Image.Image:
    """Class ids as the palette indices of a picture."""
    picture = Image.fromarray(labels)
    picture.putpalette(palette.tobytes())
    return picture


def to_rgb(image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w 3"]:
    """The first three channels; of less than three the first, as grey."""
    shown = 3 if image.shape[2] >= 3 else 1
    return np.broadcast_to(image[:, :, :shown], (*image.shape[:2], 3))


def overlay(
    image: UInt8[np.ndarray, "h w c"],
    labels: Int[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"],
    palette: UInt8[np.ndarray, "classes 3"],
    opacity: float = 0.5,
) -> UInt8[np.ndarray, "h w 3"]:
    """The label colours laid over the image."""
    mixed = (1 - opacity) * to_rgb(image) + opacity * colourise(labels, palette)
    return mixed.round().astype(np.uint8)


def comparison(
    image: UInt8[np.ndarray, "h w c"],
    truth: Int[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"],
    prediction: UInt8[np.ndarray, "h w"],
    palette: UInt8[np.ndarray, "classes 3"],
) -> UInt8[np.ndarray, "h w2 3"]:
    """Input | truth | prediction, side by side; ignored pixels are white in both."""
    seen = np.where(truth == IGNORE_LABEL, IGNORE_LABEL, prediction)
    gap = np.full((image.shape[0], 2, 3), 255, np.uint8)
    columns = [to_rgb(image), gap, colourise(truth, palette), gap, colourise(seen, palette)]
    return np.concatenate(columns, axis=1)


def stack(pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> UInt8[np.ndarray, "h w 3"]:
    """One below the other, white to the right of the narrower ones."""
    width = max(picture.shape[1] for picture in pictures)
    rows = [
        np.pad(p, ((0, 2), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures
    ]
    return np.concatenate(rows)


def contact_sheet(
    rows: Mapping[str, Mapping[str, UInt8[np.ndarray, "_ _ 3"]]],
    colours: Mapping[str, Sequence[int]],
) -> "matplotlib.figure.Figure":
    """{row: {title: picture}} as a figure, over a legend of {class: RGB}, white for ignored."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    num_columns = max(1, *(len(row) for row in rows.values()))
    legend = [*colours.items(), ("(ignored)", IGNORED_COLOUR)]
    num_legend_rows = -(-len(legend) // 6)
    figure = Figure(
        figsize=(2.6 * num_columns, 2.2 * len(rows) + 0.25 * num_legend_rows),
        dpi=150,
        layout="constrained",
    )
    grid = figure.subplots(len(rows), num_columns, squeeze=False)
    for axes, (name, pictures) in zip(grid, rows.items(), strict=True):
        axes[0].set_ylabel(name)
        for axis in axes:
            axis.set(xticks=[], yticks=[], frame_on=False)
        for axis, (title, picture) in zip(axes, pictures.items(), strict=False):
            axis.imshow(picture)
            axis.set_title(title, fontsize=7)
    patches = [
        Patch(facecolor=(red / 255, green / 255, blue / 255), edgecolor="grey", label=name)
        for name, (red, green, blue) in legend
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False)
    return figure
