"""Draws pictures of images with their labels: overlays, errors, legends, contact sheets.

A picture is an RGB image, uint8 [h, w, 3]. Never uses jax.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from dense_jax.class_colors import ERROR_COLORS, Labels, Palette, Picture, colorize
from dense_jax.labels import IGNORE_LABEL

Pixels = UInt8[np.ndarray, "h w c"]  # an image of any number of channels

OPACITY = 0.5  # the default opacity of label colors over an image
LONGEST = 480  # pixels, the maximum length of the longer side of a small picture
GAP = 4  # pixels between pictures


def to_rgb(image: Pixels) -> Picture:
    """Returns an image's first three channels, or its first as gray if it has only one or two."""
    shown = 3 if image.shape[2] >= 3 else 1
    return np.broadcast_to(image[:, :, :shown], (*image.shape[:2], 3))


def overlay(image: Pixels, labels: Labels, palette: Palette, opacity: float = OPACITY) -> Picture:
    """Blends the label colors into the image. Class 0 stays clear: its pixels show the image."""
    picture = to_rgb(image)
    mixed = (1 - opacity) * picture + opacity * colorize(labels, palette)
    return np.where(labels[..., None] == 0, picture, mixed.round()).astype(np.uint8)


def outlines(labels: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Returns the classes along the borders between classes, and 0 elsewhere, for `overlay`.

    Outlines are two pixels wide. Next to class 0, both pixels have the other class.
    """
    square = np.ones((3, 3), np.uint8)
    highest, lowest = cv2.dilate(labels, square), cv2.erode(labels, square)
    return np.where(highest == lowest, 0, np.where(labels > 0, labels, highest)).astype(np.uint8)


def mistakes(truth: Labels, prediction: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Returns a map that is 1 at wrong predictions, 2 at ignored pixels, and 0 elsewhere."""
    return np.where(truth == IGNORE_LABEL, 2, truth != prediction).astype(np.uint8)


def errors(image: Pixels, truth: Labels, prediction: UInt8[np.ndarray, "h w"]) -> Picture:
    """Draws wrong and ignored pixels in ERROR_COLORS over a darkened gray version of the image."""
    wrong = mistakes(truth, prediction)
    gray = to_rgb(image).mean(axis=2, keepdims=True) / 2
    return np.where(wrong[..., None] > 0, ERROR_COLORS[wrong], gray).astype(np.uint8)


def comparison(
    image: Pixels, truth: Labels, prediction: UInt8[np.ndarray, "h w"], palette: Palette
) -> dict[str, Picture]:
    """Returns small pictures of the input, truth, prediction and errors.

    Ignored pixels are white in every picture except the input.
    """
    image, truth, prediction = map(shrink, (to_rgb(image), truth.astype(np.uint8), prediction))
    visible = np.where(truth == IGNORE_LABEL, IGNORE_LABEL, prediction)
    return {
        "input": image,
        "truth": colorize(truth, palette),
        "prediction": colorize(visible, palette),
        "errors": errors(image, truth, prediction),
    }


def shrink(pixels: UInt8[np.ndarray, "..."], longest: int = LONGEST) -> UInt8[np.ndarray, "..."]:
    """Shrinks a picture or a class map until its longer side is at most `longest` pixels.

    Pictures [h, w, 3] are smoothed, and class maps [h, w] are subsampled.
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, longest / max(height, width))
    size = max(1, round(scale * width)), max(1, round(scale * height))
    how = Image.Resampling.LANCZOS if pixels.ndim == 3 else Image.Resampling.NEAREST
    return np.array(Image.fromarray(pixels).resize(size, how))


def stack(pictures: Sequence[Picture], axis: int = 0) -> Picture:
    """Stacks pictures vertically, or horizontally if axis is 1, on a white background."""
    across = 1 - axis
    length = max(picture.shape[across] for picture in pictures)
    padded = []
    for picture in pictures:
        margins = [(0, 0)] * 3
        margins[axis], margins[across] = (0, GAP), (0, length - picture.shape[across])
        padded.append(np.pad(picture, margins, constant_values=255))
    return np.concatenate(padded, axis)


def legend(colors: Mapping[str, Sequence[int]], width: int = LONGEST) -> Picture:
    """Draws a colored square and a name for each entry of {name: RGB}, in as many columns as fit.

    width: The maximum width in pixels. A single column may exceed this width.
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
    """Draws each (name, {title: picture}) as a row of titled pictures, with a legend of the colors."""
    sheet = []
    for name, pictures in rows:
        cells = []
        for title, picture in pictures.items():
            zoom = max(1, LONGEST // 2 // max(picture.shape))  # enlarges small pictures
            picture = picture.repeat(zoom, 0).repeat(zoom, 1)
            cells.append(stack([_text(title), _framed(picture)]))
        sheet += [_text(name), stack(cells, axis=1)] if cells else [_text(name)]
    if colors:
        sheet.append(legend(colors, max(part.shape[1] for part in sheet)))
    whole = stack(sheet)
    return np.pad(whole, ((GAP, 0), (GAP, 0), (0, 0)), constant_values=255)


def _framed(picture: Picture) -> Picture:
    """Adds a gray line around a picture, so that a white picture is visible on white."""
    return np.pad(picture, ((1, 1), (1, 1), (0, 0)), constant_values=128)


@functools.cache
def _font() -> Any:
    """Returns Matplotlib's DejaVu Sans, which covers Latin, Greek and Cyrillic, but not Chinese."""
    import matplotlib  # slow to import, and most commands draw no text

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 14)


def _text(text: str) -> Picture:
    """Draws a line of text, truncated to 60 characters."""
    text = " ".join(text.split())
    text = text if len(text) <= 60 else f"{text[:59]}…"
    line = Image.new("RGB", (math.ceil(_font().getlength(text)) + 1, 18), "white")
    ImageDraw.Draw(line).text((0, 0), text, "black", _font())
    return np.array(line)
