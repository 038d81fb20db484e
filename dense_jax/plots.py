"""Pictures of labels: colors, overlays, errors, legends, contact sheets.

The one place that says how labels look: in training's pictures and those of evaluate, predict, the
report and the demo. A picture is uint8 [h, w, 3], RGB. Never uses jax.
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

Picture = UInt8[np.ndarray, "_ _ 3"]
Pixels = UInt8[np.ndarray, "h w c"]  # an image of any number of channels
Palette = UInt8[np.ndarray, "classes 3"]
Labels = Int[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"]

OPACITY = 0.5  # default of label colors over an image
LONGEST = 480  # pixels, of the longer side of a picture among others
GAP = 4  # pixels between pictures

# The eight colors of Okabe and Ito 2008, "Color Universal Design", which color-blind readers can
# tell apart.
OKABE_ITO = "000000", "E69F00", "56B4E9", "009E73", "F0E442", "0072B2", "D55E00", "CC79A7"
# Those of lines and bars on white or black, with a brown and a gray in place of yellow and black.
LINE_COLORS = *(f"#{OKABE_ITO[i]}" for i in (5, 6, 3, 7, 1, 2)), "#8C6D31", "#7F7F7F"
IGNORED_COLOR = (255, 255, 255)
WRONG_COLOR = (255, 75, 0)  # far from dark grays and from white, to color-blind readers too
MARKS = {"(ignored)": IGNORED_COLOR, "(wrong)": WRONG_COLOR}  # entries of legends besides classes
ERROR_COLORS = np.array([(0, 0, 0), WRONG_COLOR, IGNORED_COLOR], np.uint8)  # of `mistakes`

# Linear RGB as seen by people without the pigment for green (Machado et al. 2009, table 1).
_DEUTERANOPIA = (
    (0.367322, 0.860646, -0.227968),
    (0.280085, 0.672501, 0.047413),
    (-0.011820, 0.042940, 0.968881),
)


def default_palette(num_classes: int) -> Palette:
    """Returns Okabe and Ito's colors and, if more are needed, the color farthest from all before.

    Distances are in CIELAB, to all readers or to those blind to green, whichever is less. The white
    of ignored pixels counts as a color before (Glasbey et al. 2007, "Color displays for categorical
    images"). A short palette is the beginning of every longer one.
    """
    levels = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    okabe_ito = [tuple(bytes.fromhex(color)) for color in OKABE_ITO]
    colors = np.concatenate([[IGNORED_COLOR], okabe_ito, grid])
    seen = _cielab(colors)
    distance = np.full(len(colors), np.inf)  # to the nearest color chosen
    chosen: list[int] = []
    for i in range(1 + num_classes):
        chosen.append(i if i <= len(okabe_ito) else int(distance.argmax()))
        to_chosen = np.linalg.norm(seen - seen[chosen[-1]], axis=-1).min(axis=-1)
        distance = np.minimum(distance, to_chosen)
    return colors[chosen[1:]].astype(np.uint8)


def _cielab(colors: np.ndarray) -> Float32[np.ndarray, "n 2 3"]:
    """Returns CIELAB coordinates of RGB colors [n, 3] to all readers and to those blind to green."""
    value = colors / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    blind = np.clip(linear @ np.transpose(_DEUTERANOPIA), 0, 1)
    return cv2.cvtColor(np.stack([linear, blind], axis=1).astype(np.float32), cv2.COLOR_LRGB2LAB)


def palette_of(source: Any) -> Palette:
    """Returns the dataset's own colors, or the default ones."""
    return default_palette(source.num_classes) if source.palette is None else source.palette


def colors_of(class_names: Sequence[str], palette: Palette) -> dict[str, Sequence[int]]:
    """Returns {class: RGB}, which `legend` takes."""
    return dict(zip(class_names, palette.tolist(), strict=True))


def colorize(labels: Labels, palette: Palette) -> Picture:
    """Converts class ids to colors; IGNORE_LABEL is white."""
    table = np.full((IGNORE_LABEL + 1, 3), IGNORED_COLOR, np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def indexed(labels: UInt8[np.ndarray, "h w"], palette: Palette) -> Image.Image:
    """Returns a palette picture whose indices are the class ids."""
    picture = Image.fromarray(labels)
    picture.putpalette(palette.tobytes())
    return picture


def to_rgb(image: Pixels) -> Picture:
    """Returns the first three channels, or the first one as gray if there are fewer."""
    shown = 3 if image.shape[2] >= 3 else 1
    return np.broadcast_to(image[:, :, :shown], (*image.shape[:2], 3))


def overlay(image: Pixels, labels: Labels, palette: Palette, opacity: float = OPACITY) -> Picture:
    """Lays the label colors over the image."""
    mixed = (1 - opacity) * to_rgb(image) + opacity * colorize(labels, palette)
    return mixed.round().astype(np.uint8)


def mistakes(truth: Labels, prediction: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Returns 1 where the prediction is wrong, 2 where the truth is ignored, 0 elsewhere."""
    return np.where(truth == IGNORE_LABEL, 2, truth != prediction).astype(np.uint8)


def errors(image: Pixels, truth: Labels, prediction: UInt8[np.ndarray, "h w"]) -> Picture:
    """Shows mistakes in ERROR_COLORS, and elsewhere the image, gray and half as bright."""
    wrong = mistakes(truth, prediction)
    gray = to_rgb(image).mean(axis=2, keepdims=True) / 2
    return np.where(wrong[..., None] > 0, ERROR_COLORS[wrong], gray).astype(np.uint8)


def comparison(
    image: Pixels, truth: Labels, prediction: UInt8[np.ndarray, "h w"], palette: Palette
) -> dict[str, Picture]:
    """Returns input, truth, prediction and errors, shrunk; the last three show ignored pixels white."""
    image, truth, prediction = map(shrink, (to_rgb(image), truth.astype(np.uint8), prediction))
    visible = np.where(truth == IGNORE_LABEL, IGNORE_LABEL, prediction)
    return {
        "input": image,
        "truth": colorize(truth, palette),
        "prediction": colorize(visible, palette),
        "errors": errors(image, truth, prediction),
    }


def shrink(pixels: UInt8[np.ndarray, "..."], longest: int = LONGEST) -> UInt8[np.ndarray, "..."]:
    """Limits the longer side: a picture [h, w, 3] is smoothed, classes [h, w] are sampled."""
    height, width = pixels.shape[:2]
    scale = min(1.0, longest / max(height, width))
    size = max(1, round(scale * width)), max(1, round(scale * height))
    how = Image.Resampling.LANCZOS if pixels.ndim == 3 else Image.Resampling.NEAREST
    return np.array(Image.fromarray(pixels).resize(size, how))


def stack(pictures: Sequence[Picture], axis: int = 0) -> Picture:
    """Puts pictures one below the other or, with axis 1, side by side, on white."""
    across = 1 - axis
    length = max(picture.shape[across] for picture in pictures)
    padded = []
    for picture in pictures:
        margins = [(0, 0)] * 3
        margins[axis], margins[across] = (0, GAP), (0, length - picture.shape[across])
        padded.append(np.pad(picture, margins, constant_values=255))
    return np.concatenate(padded, axis)


def legend(colors: Mapping[str, Sequence[int]], width: int = LONGEST) -> Picture:
    """Draws {name: RGB} as squares with names, in as many columns as the width has room for.

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
    rows: Sequence[tuple[str, Mapping[str, Picture]]], colors: Mapping[str, Sequence[int]]
) -> Picture:
    """Draws rows (name, {title: picture}), each below its name, and the legend of {name: RGB}."""
    sheet = []
    for name, pictures in rows:
        cells = []
        for title, picture in pictures.items():
            zoom = max(1, LONGEST // 2 // max(picture.shape))  # shows small pictures' pixels
            picture = picture.repeat(zoom, 0).repeat(zoom, 1)
            cells.append(stack([_text(title), _framed(picture)]))
        sheet += [_text(name), stack(cells, axis=1)] if cells else [_text(name)]
    whole = stack([*sheet, legend(colors, max(part.shape[1] for part in sheet))])
    return np.pad(whole, ((GAP, 0), (GAP, 0), (0, 0)), constant_values=255)


def _framed(picture: Picture) -> Picture:
    """Adds a gray line around a picture, so that white shows on white."""
    return np.pad(picture, ((1, 1), (1, 1), (0, 0)), constant_values=128)


@functools.cache
def _font() -> Any:
    """Returns Matplotlib's DejaVu Sans: Latin, Greek, Cyrillic and more, but no Chinese."""
    import matplotlib  # slow to import, and most commands draw nothing

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 14)


def _text(text: str) -> Picture:
    """Draws a line of text, cut to 60 characters."""
    text = " ".join(text.split())
    text = text if len(text) <= 60 else f"{text[:59]}…"
    line = Image.new("RGB", (math.ceil(_font().getlength(text)) + 1, 18), "white")
    ImageDraw.Draw(line).text((0, 0), text, "black", _font())
    return np.array(line)
