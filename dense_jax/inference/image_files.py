"""The image files that a user names: files, globs and folders. Never uses jax.

A folder stands for the files directly in it whose endings are those of images; a glob for all that
it matches, "**" for folders below. What lies in the output folder is a result, not an image: a
command that is given twice finds the same images.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from dense_jax.data import decode, files
from dense_jax.data.strips import describe, strips


class Image(NamedTuple):
    """A page of a file, or all of it."""

    path: Path
    page: int | None
    name: str  # of its results
    size: tuple[int, int]  # height and width, pixels


def find(arguments: Sequence[str], output: Path) -> list[Path]:
    """The files, each once. Raises ValueError naming an argument that stands for none."""
    # Links count by their own names: identical images of a data manager are links to one file.
    found: dict[tuple[str, str], Path] = {}
    for argument in arguments:
        matched = _matched(argument)
        images = [path for path in matched if _real(path.parent) != _real(output)]
        if not images:
            why = "matches no file"
            if matched:
                why = f"has only what is in --output={output}: pass another --output"
            raise ValueError(f"--images={argument!r} {why}")
        for path in images:
            found.setdefault((_real(path.parent), path.name), path)
    if not found:
        raise ValueError("--images names no file")
    return list(found.values())


def _real(path: Path) -> str:
    return os.path.realpath(path)  # where Path.resolve raises an error for a link to itself


def _matched(argument: str) -> list[Path]:
    path = Path(argument)
    if path.is_dir():
        paths = [
            each
            for each in path.iterdir()
            if each.suffix.lower() in files.IMAGE_ENDINGS and not each.name.startswith(".")
        ]
    else:  # A file is meant where there is one, even if its name looks like a glob.
        paths = [path] if path.exists() else map(Path, glob.glob(argument, recursive=True))
    return sorted(each for each in paths if not os.path.isdir(each))


def headers(paths: Sequence[Path], max_pixels: float = np.inf) -> tuple[list[Image], list[str]]:
    """The images in files, by their headers alone, and what is wrong with those left out."""
    images: list[Image] = []
    problems: list[str] = []
    for path in paths:
        try:
            if not path.is_file() and path.exists():
                raise ValueError(f"{path}: not a file")  # a pipe would be waited for
            with path.open("rb") as file:
                pages = decode.pages(file, str(path))
        except (OSError, ValueError) as problem:
            problems.append(str(problem))
            continue
        for page in pages:
            try:
                size = _size(path, page, max_pixels)
            except (OSError, ValueError) as problem:
                problems.append(str(problem))
                continue
            of_page = f"_page{page:03d}" if len(pages) > 1 else ""
            images.append(Image(path, page, path.stem + of_page, size))
    return images, problems


def _size(path: Path, page: int | None, max_pixels: float) -> tuple[int, int]:
    where = describe(path, page)
    with path.open("rb") as file:
        return decode.image_header(file, where, page, max_pixels)[:2]


class ImageFiles:
    """Images that are read by strips. sizes: int [n, 2], pixels."""

    def __init__(
        self, images: Sequence[Image], num_channels: int, value_range: decode.Range | None
    ):
        self._images = images
        self._num_channels = num_channels
        self._value_range = value_range
        self.sizes = np.array([image.size for image in images], np.int32)

    def strips(self, i: int) -> Iterator[UInt8[np.ndarray, "_ w c"]]:
        """The rows of an image, in order."""
        path, page, *_ = self._images[i]
        return strips(path, self._num_channels, page=page, value_range=self._value_range)
