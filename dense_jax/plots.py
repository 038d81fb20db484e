"""Pictures of labels: colors, overlays, errors, legends, contact sheets.

The one place that says how labels look: in training's pictures, evaluate's, predict's, the report's
and the demo's. A picture is uint8 [h, w, 3], RGB. Never uses jax.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from dense_jax.labels import IGNORE_LABEL

OPACITY = 0.5  # of label colors over an image, unless the user wants another
LONGEST = 480  # pixels, of the longer side of a picture among others
GAP = 4  # pixels between pictures

# Okabe and Ito 2008, "Color Universal Design": their eight colors, told apart by color-blind
# readers too.
OKABE_ITO = tuple(
    tuple(bytes.fromhex(color))
    for color in ["000000", "E69F00", "56B4E9", "009E73", "F0E442", "0072B2", "D55E00", "CC79A7"]
)
IGNORED_COLOR = (255, 255, 255)
WRONG_COLOR = (255, 75, 0)  # far from dark grays and from white, to color-blind readers too
MARKS = {"(ignored)": IGNORED_COLOR, "(wrong)": WRONG_COLOR}  # what legends say besides classes
ERROR_COLORS = np.array([(0, 0, 0), WRONG_COLOR, IGNORED_COLOR], np.uint8)  # of `mistakes`

# What someone without the pigment for green sees of linear RGB (Machado et al. 2009, table 1).
_DEUTERANOPIA = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)


def default_palette(num_classes: int) -> UInt8[np.ndarray, "classes 3"]:
    """Okabe and Ito's colors; where more are needed, each one as far as can be from all before.

    Far in CIELAB, to all readers or to those blind to green, whichever is less, and also from the
    white of ignored pixels (Glasbey et al. 2007, "Color displays for categorical images"). A short
    palette is the beginning of every longer one.
    """
    levels = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    colors = np.concatenate([[IGNORED_COLOR], OKABE_ITO, grid])
    seen = _seen(colors)
    distance = np.full(len(colors), np.inf)  # to the nearest color chosen
    chosen: list[int] = []
    for i in range(1 + num_classes):
        chosen.append(i if i <= len(OKABE_ITO) else int(distance.argmax()))
        to_chosen = np.linalg.norm(seen - seen[chosen[-1]], axis=-1).min(axis=-1)
        distance = np.minimum(distance, to_chosen)
    return colors[chosen[1:]].astype(np.uint8)


def _seen(colors: np.ndarray) -> Float32[np.ndarray, "n 2 3"]:
    """CIELAB coordinates of RGB colors [n, 3] to all readers and to those blind to green."""
    value = colors / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    both = np.stack([linear, np.clip(linear @ _DEUTERANOPIA.T, 0, 1)], axis=1)
    return cv2.cvtColor(both.astype(np.float32), cv2.COLOR_LRGB2LAB)


def palette_of(source: Any) -> UInt8[np.ndarray, "classes 3"]:
    """The dataset's own colors, or ours."""
    return default_palette(source.num_classes) if source.palette is None else source.palette


def colors_of(
    class_names: Sequence[str], palette: UInt8[np.ndarray, "classes 3"]
) -> dict[str, Sequence[int]]:
    """{class: RGB}, as of `legend`."""
    return dict(zip(class_names, palette.tolist(), strict=True))


def colorize(
    labels: Int[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"],
    palette: UInt8[np.ndarray, "classes 3"],
) -> UInt8[np.ndarray, "h w 3"]:
    """Class ids to colors; IGNORE_LABEL is white."""
    table = np.full((IGNORE_LABEL + 1, 3), IGNORED_COLOR, np.uint8)
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
    """The first three channels; of less than three the first, as gray."""
    shown = 3 if image.shape[2] >= 3 else 1
    return np.broadcast_to(image[:, :, :shown], (*image.shape[:2], 3))


def overlay(
    image: UInt8[np.ndarray, "h w c"],
    labels: Int[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"],
    palette: UInt8[np.ndarray, "classes 3"],
    opacity: float = OPACITY,
) -> UInt8[np.ndarray, "h w 3"]:
    """The label colors laid over the image."""
    mixed = (1 - opacity) * to_rgb(image) + opacity * colorize(labels, palette)
    return mixed.round().astype(np.uint8)


def mistakes(
    truth: Int[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"], prediction: UInt8[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w"]:
    """1 where the prediction is wrong, 2 where the truth is ignored, 0 elsewhere."""
    return np.where(truth == IGNORE_LABEL, 2, truth != prediction).astype(np.uint8)


def errors(
    image: UInt8[np.ndarray, "h w c"],
    truth: Int[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"],
    prediction: UInt8[np.ndarray, "h w"],
) -> UInt8[np.ndarray, "h w 3"]:
    """WRONG_COLOR where the prediction is wrong, white where the truth is ignored, and elsewhere the
    image, gray and half as bright.
    """
    found = mistakes(truth, prediction)
    gray = to_rgb(image).mean(axis=2, keepdims=True) / 2
    return np.where(found[..., None] > 0, ERROR_COLORS[found], gray).astype(np.uint8)


def comparison(
    image: UInt8[np.ndarray, "h w c"],
    truth: Int[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"],
    prediction: UInt8[np.ndarray, "h w"],
    palette: UInt8[np.ndarray, "classes 3"],
) -> dict[str, UInt8[np.ndarray, "_ _ 3"]]:
    """Input, truth, prediction and errors, shrunk; ignored pixels are white in the last three."""
    image, truth, prediction = (
        shrink(each) for each in (to_rgb(image), truth.astype(np.uint8), prediction)
    )
    seen = np.where(truth == IGNORE_LABEL, IGNORE_LABEL, prediction)
    return {
        "input": image,
        "truth": colorize(truth, palette),
        "prediction": colorize(seen, palette),
        "errors": errors(image, truth, prediction),
    }


def shrink(pixels: UInt8[np.ndarray, "..."], longest: int = LONGEST) -> UInt8[np.ndarray, "..."]:
    """At most so many pixels long: a picture [h, w, 3] smoothly, classes [h, w] by nearest pixels."""
    height, width = pixels.shape[:2]
    scale = min(1.0, longest / max(height, width))
    size = max(1, round(scale * width)), max(1, round(scale * height))
    how = Image.Resampling.LANCZOS if pixels.ndim == 3 else Image.Resampling.NEAREST
    return np.array(Image.fromarray(pixels).resize(size, how))


def stack(
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], axis: int = 0
) -> UInt8[np.ndarray, "h w 3"]:
    """One below the other, or with axis 1 side by side, on white."""
    across = 1 - axis
    length = max(picture.shape[across] for picture in pictures)

    def pad(picture: np.ndarray) -> np.ndarray:
        margins = [(0, 0)] * 3
        margins[axis], margins[across] = (0, GAP), (0, length - picture.shape[across])
        return np.pad(picture, margins, constant_values=255)

    return np.concatenate([pad(picture) for picture in pictures], axis)


def legend(colors: Mapping[str, Sequence[int]], width: int = LONGEST) -> UInt8[np.ndarray, "_ _ 3"]:
    """{name: RGB} as a square of each color with its name, in as many columns as the width takes.

    width: pixels; the longest name may need more.
    """
    entries = []
    for name, color in colors.items():
        text = _text(name)
        square = np.full((text.shape[0], text.shape[0], 3), color, np.uint8)
        entries.append(stack([_framed(square), text], axis=1))
    widest = max(entry.shape[1] for entry in entries)
    blank = np.full((1, widest, 3), 255, np.uint8)  # makes columns equally wide
    num_rows = math.ceil(len(entries) / max(1, width // (widest + GAP)))
    columns = [entries[i : i + num_rows] for i in range(0, len(entries), num_rows)]
    return stack([stack([*column, blank]) for column in columns], axis=1)


def contact_sheet(
    rows: Sequence[tuple[str, Mapping[str, UInt8[np.ndarray, "_ _ 3"]]]],
    colors: Mapping[str, Sequence[int]],
) -> UInt8[np.ndarray, "h w 3"]:
    """Rows (name, {title: picture}), each below its name, over the legend of {name: RGB}."""
    sheet = []
    for name, pictures in rows:
        cells = []
        for title, picture in pictures.items():
            zoom = max(1, LONGEST // 2 // max(picture.shape))  # of small ones pixels become squares
            picture = picture.repeat(zoom, 0).repeat(zoom, 1)
            cells.append(stack([_text(title), _framed(picture)]))
        sheet += [_text(name), stack(cells, axis=1)] if cells else [_text(name)]
    width = max(part.shape[1] for part in sheet)
    return np.pad(
        stack([*sheet, legend(colors, width)]), ((GAP, 0), (GAP, 0), (0, 0)), constant_values=255
    )


def _framed(picture: UInt8[np.ndarray, "_ _ 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
    """In a gray line, by which white shows on white."""
    return np.pad(picture, ((1, 1), (1, 1), (0, 0)), constant_values=128)


@functools.cache
def _font() -> Any:
    """DejaVu Sans, which Matplotlib brings: Latin, Greek, Cyrillic and more, but no Chinese."""
    import matplotlib  # long to import, and most commands draw nothing

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 14)


def _text(text: str) -> UInt8[np.ndarray, "_ _ 3"]:
    """A line of text, of at most 60 characters."""
    text = " ".join(text.split())
    text = text if len(text) <= 60 else f"{text[:59]}…"
    line = Image.new("RGB", (math.ceil(_font().getlength(text)) + 1, 18), "white")
    ImageDraw.Draw(line).text((0, 0), text, "black", _font())
    return np.array(line)
