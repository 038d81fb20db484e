"""The colors of the classes in all pictures, reports and class maps.

Never uses jax.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, Int, UInt8
from PIL import Image

from dense_jax import regions
from dense_jax.labels import IGNORE_LABEL

Picture = UInt8[np.ndarray, "_ _ 3"]
Palette = UInt8[np.ndarray, "classes 3"]
Labels = Int[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"]

# The eight colors of Okabe and Ito 2008, "Color Universal Design", which color-blind readers can
# tell apart.
OKABE_ITO = "000000", "E69F00", "56B4E9", "009E73", "F0E442", "0072B2", "D55E00", "CC79A7"
# Colors for lines and bars on white or black, with a brown and a gray instead of yellow and black.
LINE_COLORS = *(f"#{OKABE_ITO[i]}" for i in (5, 6, 3, 7, 1, 2)), "#8C6D31", "#7F7F7F"
IGNORED_COLOR = (255, 255, 255)
WRONG_COLOR = (255, 75, 0)  # distinct from dark grays and white, also for color-blind readers
MARKS = {"(ignored)": IGNORED_COLOR, "(wrong)": WRONG_COLOR}  # legend entries besides the classes
ERROR_COLORS = np.array([(0, 0, 0), WRONG_COLOR, IGNORED_COLOR], np.uint8)  # see drawing.mistakes

# Converts linear RGB to what people with deuteranopia see (Machado et al. 2009, table 1).
_DEUTERANOPIA = (
    (0.367322, 0.860646, -0.227968),
    (0.280085, 0.672501, 0.047413),
    (-0.011820, 0.042940, 0.968881),
)


def default_palette(num_classes: int) -> Palette:
    """Returns `num_classes` colors: Okabe and Ito's eight, then colors as distinct as possible.

    Each later color has the largest distance to the nearest of white and all earlier colors. The
    distance is in CIELAB, under normal vision or deuteranopia, whichever is smaller (Glasbey et al.
    2007, "Color displays for categorical images"). A shorter palette is a prefix of every longer
    palette.
    """
    levels = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    okabe_ito = [tuple(bytes.fromhex(color)) for color in OKABE_ITO]
    colors = np.concatenate([[IGNORED_COLOR], okabe_ito, grid])
    seen = _cielab(colors)
    distance = np.full(len(colors), np.inf)  # to the nearest chosen color
    chosen: list[int] = []
    for i in range(1 + num_classes):
        chosen.append(i if i <= len(okabe_ito) else int(distance.argmax()))
        to_chosen = np.linalg.norm(seen - seen[chosen[-1]], axis=-1).min(axis=-1)
        distance = np.minimum(distance, to_chosen)
    return colors[chosen[1:]].astype(np.uint8)


def _cielab(colors: np.ndarray) -> Float32[np.ndarray, "n 2 3"]:
    """Converts RGB colors [n, 3] to CIELAB, for normal vision and for deuteranopia."""
    value = colors / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    blind = np.clip(linear @ np.transpose(_DEUTERANOPIA), 0, 1)
    return cv2.cvtColor(np.stack([linear, blind], axis=1).astype(np.float32), cv2.COLOR_LRGB2LAB)


def palette_of(source: Any) -> Palette:
    """Returns the dataset's own palette, or the default palette if the dataset has none."""
    return default_palette(source.num_classes) if source.palette is None else source.palette


def prediction_colors(source: Any) -> dict[str, Sequence[int]]:
    """Returns {name: RGB} of what `regions.flat` has of a source's predictions."""
    if source.regions is None:
        return colors_of(source.class_names, palette_of(source))
    names = regions.OUTSIDE, *source.regions.names
    return colors_of(names, default_palette(len(names)))


def colors_of(class_names: Sequence[str], palette: Palette) -> dict[str, Sequence[int]]:
    """Returns {class name: RGB}, as `drawing.legend` expects."""
    return dict(zip(class_names, palette.tolist(), strict=True))


def to_palette(colors: Mapping[str, Sequence[int]]) -> Palette:
    """Returns the colors of a legend as an array."""
    return np.array(list(colors.values()), np.uint8)


def colorize(labels: Labels, palette: Palette) -> Picture:
    """Converts class ids to colors. IGNORE_LABEL becomes white."""
    table = np.full((IGNORE_LABEL + 1, 3), IGNORED_COLOR, np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def indexed(labels: UInt8[np.ndarray, "h w"], palette: Palette) -> Image.Image:
    """Returns an indexed-color image whose pixel values are the class ids."""
    picture = Image.fromarray(labels)
    picture.putpalette(palette.tobytes())
    return picture
