"""Encoded image files to arrays; every error is a ValueError that names the file.

`file` is an open binary file, `where` is what messages call it.
"""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from dense_jax.labels import IGNORE_LABEL

BinaryFile = io.BytesIO | io.BufferedReader

_GREY_MODES = ("1", "L", "LA")
_UNDECLARED = -1


def _open(file: BinaryFile, where: str, *, pixels: bool) -> Image.Image:
    """Reads the header of an image file, and its `pixels` too where asked."""
    try:
        image = Image.open(file)
        num_pages = getattr(image, "n_frames", 1)
        if pixels:
            image.load()
    except Exception as error:  # on broken bytes decoders raise nearly anything
        raise ValueError(f"{where}: not a readable image ({error})") from error
    if num_pages > 1 and image.format != "MPO":  # a camera's JPEG, with previews after the image
        raise ValueError(f"{where}: holds {num_pages} pages; save each page as a file of its own")
    return image


def _check_depth(image: Image.Image, where: str) -> None:
    if image.mode[0] in "IF":
        raise ValueError(
            f"{where}: an image has 8 bits per channel, this one is mode {image.mode!r}; "
            "scale its values to 0..255 and save it again"
        )


def image_header(file: BinaryFile, where: str) -> tuple[int, int, bool]:
    """Height and width in pixels and whether the image is grey, without decoding it."""
    image = _open(file, where, pixels=False)
    _check_depth(image, where)
    return image.height, image.width, image.mode in _GREY_MODES


def read_image(file: BinaryFile, where: str, num_channels: int) -> UInt8[np.ndarray, "h w c"]:
    """Decodes an image to grey (1 channel) or RGB (3 channels); alpha is dropped."""
    image = _open(file, where, pixels=True)
    _check_depth(image, where)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    pixels = np.array(image.convert("L" if num_channels == 1 else "RGB"))
    return pixels.reshape(image.height, image.width, num_channels)


def label_table(values: Sequence[int], ignored_values: Sequence[int]) -> Int32[np.ndarray, "65536"]:
    """The lookup table raw value -> class, for `values[i]` the raw value of class i."""
    table = np.full(2**16, _UNDECLARED, np.int32)
    table[list(ignored_values)] = IGNORE_LABEL
    table[list(values)] = np.arange(len(values))
    return table


def read_label(
    file: BinaryFile, where: str, table: Int32[np.ndarray, "65536"]
) -> Int32[np.ndarray, "h w"]:
    """Decodes a label image (grey values or palette indices) to classes by `label_table`."""
    image = _open(file, where, pixels=True)
    raw = np.asarray(image)
    if raw.ndim != 2 or raw.dtype not in (np.bool_, np.uint8, np.uint16):
        raise ValueError(
            f"{where}: a label has one channel of 8 or 16 bits, this one is mode {image.mode!r}; "
            "save raw class values or palette indices"
        )
    label = table[raw.astype(np.uint16)]
    if label.min() == _UNDECLARED:
        raise ValueError(f"{where}: {_undeclared(raw, table)}")
    return label


def _undeclared(raw: np.ndarray, table: np.ndarray) -> str:
    """Says which raw values are not in the table, with the file's histogram."""
    values, counts = np.unique(raw.astype(np.uint16), return_counts=True)
    foreign = [int(v) for v in values if table[v] == _UNDECLARED]
    histogram = ", ".join(f"{v}: {n}" for v, n in list(zip(values, counts, strict=True))[:20])
    message = (
        f"label values {foreign[:10]} are not declared; list them in 'values' or 'ignored_values'. "
        f"Histogram (raw value: pixels): {histogram}{', ...' if len(values) > 20 else ''}"
    )
    if set(values.tolist()) <= {0, 255}:
        message += '. For a binary mask of 0 and 255 write "values": [0, 255]'
    return message


def check_same_size(image: np.ndarray, label: np.ndarray, where: str) -> None:
    """Raises if an image [h, w, c] and its label [h, w] differ in height or width."""
    if image.shape[:2] != label.shape:
        raise ValueError(
            f"{where}: the image has {image.shape[0]} x {image.shape[1]} pixels "
            f"(height x width), its label {label.shape[0]} x {label.shape[1]}"
        )
