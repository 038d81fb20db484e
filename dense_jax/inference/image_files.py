"""Finds the image files that a user specifies as files, globs or folders. Does not import jax.

A folder stands for the files directly inside it that have image extensions. A glob stands for all
files that it matches, and "**" matches folders at any depth. Files in the output folder are
skipped because they are results of an earlier command.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from dense_jax import buckets, storage
from dense_jax.data import decode, files
from dense_jax.data.image_strips import describe, strips


class Image(NamedTuple):
    """Describes an image file, or one page of a multi-page file."""

    path: Path
    page: int | None
    name: str  # the start of the file names of the results
    size: tuple[int, int]  # height and width, in pixels
    nodata: float | None = None  # these two as in `decode.Header`
    geo_tags: decode.GeoTags = ()

    @property
    def is_geotiff(self) -> bool:
        """Returns whether the file has geo tags or declares a nodata value."""
        return bool(self.geo_tags) or self.nodata is not None


def find(arguments: Sequence[str], output: Path) -> list[Path]:
    """Returns image files without duplicates. Raises ValueError if an argument matches no image."""
    # Links are not resolved, because data managers store identical images as links to one file.
    paths: dict[tuple[str, str], Path] = {}
    for argument in arguments:
        matches = _matches(argument)
        images = [path for path in matches if _real(path.parent) != _real(output)]
        if not images:
            reason = "matches no file"
            if matches:
                reason = f"has only what is in --output={output}: pass another --output"
            raise ValueError(f"--images={argument!r} {reason}")
        for path in images:
            paths.setdefault((_real(path.parent), path.name), path)
    if not paths:
        raise ValueError("--images names no file")
    return list(paths.values())


def _real(path: Path) -> str:
    return os.path.realpath(path)  # Path.resolve fails on a link to itself


def _matches(argument: str) -> list[Path]:
    path = Path(argument)
    if buckets.is_url(argument):
        paths = storage.local_files(argument, files.IMAGE_ENDINGS)
    elif path.is_dir():
        paths = [
            file
            for file in path.iterdir()
            if file.suffix.lower() in files.IMAGE_ENDINGS and not file.name.startswith(".")
        ]
    elif path.exists():  # even if the name looks like a glob
        paths = [path]
    else:
        paths = map(Path, glob.glob(argument, recursive=True))
    return sorted(path for path in paths if not os.path.isdir(path))


def headers(paths: Sequence[Path], max_pixels: float = np.inf) -> tuple[list[Image], list[str]]:
    """Returns a description of each image in the files, and an error for each skipped image.

    Reads only the headers.
    """
    images: list[Image] = []
    problems: list[str] = []
    for path in paths:
        try:
            if not path.is_file() and path.exists():
                raise ValueError(f"{path}: not a file")  # opening a pipe would block
            with path.open("rb") as file:
                pages = decode.pages(file, str(path))
                for page in pages:
                    name = path.stem + (f"_page{page:03d}" if len(pages) > 1 else "")
                    try:
                        file.seek(0)
                        header = decode.image_header(file, describe(path, page), page, max_pixels)
                        geo = header.nodata, header.geo_tags
                        images.append(Image(path, page, name, header[:2], *geo))
                    except ValueError as problem:
                        problems.append(str(problem))
        except (OSError, ValueError) as problem:
            problems.append(str(problem))
    return images, problems


def single(path: Path) -> Image:
    """Returns the description of the only image in a file. Raises ValueError if there is none."""
    images, problems = headers([path.expanduser()])
    if problems:
        raise ValueError(problems[0])
    if len(images) > 1:
        raise ValueError(f"{path}: has {len(images)} pages; pass one of them as an array")
    return images[0]


class ImageFiles:
    """Image files that implement the protocol `stitching.Images`."""

    def __init__(
        self,
        images: Sequence[Image],
        num_channels: int,
        value_range: decode.Range | None,
        dtype: str = "uint8",
    ):
        self._images, self._num_channels = images, num_channels
        self._options = {"value_range": value_range, "dtype": dtype}
        self.sizes = np.array([image.size for image in images], np.int32)

    def strips(self, i: int) -> Iterator[Shaped[np.ndarray, "_ w c"]]:
        """Yields the rows of image i from top to bottom, in strips."""
        path, page, *_ = self._images[i]
        return strips(path, self._num_channels, page=page, **self._options)
