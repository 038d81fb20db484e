"""Holds the images that every format is read into. The layers of an image cover each other.

Paths are patterns. SPLIT, NAME and CLASS stand for what they are called in the output, * for
anything, and NAME.* for an image of any format.
"""

import glob
import pathlib
import re
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from dense_jax.data import decode, files
from dense_jax.labels import IGNORE_LABEL

BACKGROUND = "background"  # pixels of this class belong to no object
IGNORED = "__ignore__"  # labelme's name for pixels that count nowhere, used for all formats

Shape = tuple[int, int]  # height, width


class Layer(NamedTuple):
    """Pixels of one class. Layers with the same `key` are one object; None is no object."""

    mask: Bool[np.ndarray, "h w"]
    class_name: str
    key: Hashable = None


class Item(NamedTuple):
    """An image and its annotation, not yet read.

    layers: Returns the layers of an image of a height and width, lowest first.
    sources, text: The files besides the image, and whatever else, that the layers are made from.
    embedded: Returns the bytes of the image, if no file `image` exists.
    """

    split: str | None  # None if the paths do not say it
    name: str
    image: pathlib.Path
    layers: Callable[[Shape], Iterable[Layer]]
    sources: tuple[pathlib.Path, ...] = ()
    text: str = ""
    embedded: Callable[[], bytes] | None = None


class Export(NamedTuple):
    """The images of an export.

    rest: The class of pixels that no layer covers. order: What decides which layer lies on top.
    """

    items: list[Item]
    class_names: list[str]
    order: str = ""
    rest: str = BACKGROUND
    has_objects: bool = True
    palette: list[list[int]] | None = None
    note: str = ""

    @property
    def ids(self) -> dict[str, int]:
        """Returns the value of each class in the labels."""
        return {name: i for i, name in enumerate(self.class_names)} | {IGNORED: IGNORE_LABEL}


def with_background(names: Iterable[str]) -> list[str]:
    """Returns the class names, with the background as class 0."""
    return [BACKGROUND, *(name for name in names if name not in (BACKGROUND, IGNORED))]


_HOLES = re.compile(r"((?<![A-Z])(?:SPLIT|NAME|CLASS)(?![A-Z])|\*)")


def find(pattern: str) -> list[tuple[dict[str, str], pathlib.Path]]:
    """Returns the files that match a pattern, sorted, with what each placeholder stands for.

    Raises ValueError if there are none.
    """
    literals, holes = _HOLES.split(pattern)[::2], _HOLES.split(pattern)[1::2]
    matching, expression = glob.escape(literals[0]), re.escape(literals[0])
    for hole, literal in zip(holes, literals[1:], strict=True):
        matching += "*" + glob.escape(literal)
        group = f"(?P={hole})" if f"<{hole}>" in expression else f"(?P<{hole}>[^/]+)"
        expression += ("[^/]*" if hole == "*" else group) + re.escape(literal)
    endings = files.IMAGE_ENDINGS if pattern.endswith(".*") else ("",)
    found = []
    for path in sorted(glob.glob(matching)):
        match = re.fullmatch(expression, path)
        if match and path.lower().endswith(endings):
            values = {hole: files.composed(value) for hole, value in match.groupdict().items()}
            found.append((values, pathlib.Path(path)))
    if not found:
        raise ValueError(f"{pattern}: no such files")
    return found


def fill(pattern: str, values: dict[str, str]) -> str:
    """Returns the pattern with its placeholders replaced by their values."""
    return _HOLES.sub(lambda match: values.get(match[0], match[0]), pattern)


def named(pattern: str, ending: str) -> str:
    """Returns the pattern; a folder becomes the pattern of the files in it."""
    return pattern if "NAME" in _HOLES.findall(pattern) else f"{pattern.rstrip('/')}/NAME{ending}"


def read_rgb(path: pathlib.Path) -> UInt8[np.ndarray, "h w 3"]:
    """Reads the colors of a mask. Transparent pixels are black."""
    with decode.reading(str(path)), Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError("a mask has 8 bits per channel; save it so")
        rgba = np.asarray(image.convert("RGBA"))
    return rgba[..., :3] * (rgba[..., 3:] > 0)
