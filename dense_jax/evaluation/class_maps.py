"""The class maps that a network predicted for a split, in one file: a zip archive of palette PNGs.

One file, for clusters count files, and because it appears whole or not at all. Any file manager
opens it. A member is called by the image's number in its split, and then by as much of its name as
every system takes: names may repeat, and hold anything. Never uses jax.
"""

import contextlib
import io
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from dense_jax import plots, storage


@contextlib.contextmanager
def writing(
    path: epath.PathLike, names: Sequence[str], palette: UInt8[np.ndarray, "classes 3"]
) -> Iterator[Callable[[int, np.ndarray], None]]:
    """Gives a function of (image number, class map uint8 [h, w]); the file is there at the end."""
    with storage.atomic(path) as file, zipfile.ZipFile(file, "w") as archive:

        def add(i: int, classes: np.ndarray) -> None:
            picture = io.BytesIO()
            # By level 1: 4 times as fast, 20 % larger.
            plots.indexed(classes, palette).save(picture, "PNG", compress_level=1)
            name = re.sub(r"[^A-Za-z0-9.-]", "_", names[i])[:100]
            # A date of its own would make every file another one.
            archive.writestr(zipfile.ZipInfo(f"{i:05d}_{name}.png"), picture.getvalue())

        yield add


def read(path: epath.PathLike, numbers: Sequence[int]) -> list[UInt8[np.ndarray, "_ _"]]:
    """The class maps of these images. KeyError if one is not there."""
    with epath.Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
        members = {int(name.partition("_")[0]): name for name in archive.namelist()}
        return [np.array(Image.open(io.BytesIO(archive.read(members[i])))) for i in numbers]


def draw(
    path: epath.PathLike, source: Any, numbers: Sequence[int], scores: np.ndarray
) -> UInt8[np.ndarray, "h w 3"]:
    """Some images of a split, what was predicted of them, and their scores: those of all are [n]."""
    palette = plots.palette_of(source)
    rows = []
    for i, classes in zip(numbers, read(path, numbers), strict=True):
        example = source[i]
        pictures = plots.comparison(example["image"], example["label"], classes, palette)
        rows.append((f"{example['name']}: mean IoU {scores[i]:.3f}", pictures))
    return plots.contact_sheet(rows, plots.colors_of(source.class_names, palette) | plots.MARKS)
