"""Reads images of any size from top to bottom, one strip of rows at a time.

`decode.read_image` reads small images whole. NumPy (.npy files) or libvips reads large images in
strips. If libvips might return different pixel values than `decode.read_image`, for example for a
CMYK image, `decode.read_image` reads the image whole, whatever its size. Even libvips has to decode
interlaced PNG and progressive JPEG files whole.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Shaped

from dense_jax.data import decode

WHOLE = 2**25  # the largest image that is read at once, in pixels
STRIP = 2**22  # the approximate size of a strip, in pixels

_Rows = Callable[[int, int], Shaped[np.ndarray, "_ w c"]]  # (start, stop) -> rows[start:stop]
# The libvips loaders and formats that may be read. `decode` reads all other images.
_LOADERS = ("jpeg", "png", "tiff")
_INTERPRETATIONS = ("b-w", "srgb", "grey16", "rgb16", "multiband")
_DTYPES = {
    "uchar": np.uint8,
    "char": np.int8,
    "ushort": np.uint16,
    "short": np.int16,
    "uint": np.uint32,
    "int": np.int32,
    "float": np.float32,
    "double": np.float64,
}
_TIFF_COMPRESSIONS = (1, 5, 7, 8, 32773, 32946)  # none, LZW, JPEG, Deflate, PackBits


def strips(
    path: pathlib.Path,
    num_channels: int,
    *,
    page: int | None = None,
    dtype: str = "uint8",
    value_range: decode.Range | None = None,
) -> Iterator[Shaped[np.ndarray, "_ w c"]]:
    """Yields an image as strips of rows, from top to bottom.

    See `decode.read_image` for the arguments. Raises ValueError if the file is corrupt, possibly
    only after some strips.
    """
    where = describe(path, page)
    with path.open("rb") as file:
        header = decode.image_header(file, where, page)
        shape = header[:3]
        decode.check_channels(shape[2], where, num_channels)
        file.seek(0)
        rows = None
        if shape[0] * shape[1] > WHOLE:
            with decode.reading(where):
                rows = _numpy_rows(path, shape) or _vips_rows(path, page, shape)
        if rows is None:
            yield decode.read_image(
                file, where, num_channels, page=page, dtype=dtype, value_range=value_range
            )
            return
    height = max(1, STRIP // shape[1])
    for start in range(0, shape[0], height):
        with decode.reading(where):
            pixels = rows(start, min(start + height, shape[0]))
        yield decode.convert(pixels, where, num_channels, dtype, value_range, header.nodata)


def describe(path: pathlib.Path, page: int | None) -> str:
    """Returns the name of a file, or of a page in the file, for messages."""
    return str(path) if page is None else f"{path}, page {page}"


def _numpy_rows(path: pathlib.Path, shape: tuple[int, int, int]) -> _Rows | None:
    with path.open("rb") as file:
        if file.read(4) != b"\x93NUM":
            return None
    # The file is mapped again for every strip, so that rows already read leave the memory.
    return lambda start, stop: np.array(np.load(path, mmap_mode="r").reshape(shape)[start:stop])


def _vips_rows(path: pathlib.Path, page: int | None, shape: tuple[int, int, int]) -> _Rows | None:
    h, w, c = shape
    with path.open("rb", buffering=0) as file:
        is_tiff = file.read(4) in decode.TIFF
        if is_tiff and not _is_plain_tiff(path, page):
            return None
        file.seek(0)
        image = _open_vips(file.fileno(), page, is_tiff)
    if image is None or (image.height, image.width) != (h, w) or image.bands < c:
        return None
    import pyvips

    region = pyvips.Region.new(image)

    def rows(start: int, stop: int) -> np.ndarray:
        pixels = np.frombuffer(region.fetch(0, start, w, stop - start), _DTYPES[image.format])
        return pixels.reshape(stop - start, w, image.bands)[..., :c]

    return rows


def _open_vips(descriptor: int, page: int | None, is_tiff: bool) -> Any:
    """Opens an image with libvips and applies its EXIF orientation.

    Returns None if the pixels might differ from those that `decode` returns.
    """
    import pyvips  # few images are so large

    pyvips.cache_set_max(0)  # otherwise images and rows stay in memory after use
    # libvips makes a corrupt TIFF tile black, with a warning but without an error.
    options: dict[str, Any] = {"fail_on": "warning" if is_tiff else "error"}
    if page is not None:
        options["page"] = page

    def opened(access: str) -> Any:
        source = pyvips.Source.new_from_descriptor(descriptor)  # ignores the file name
        return pyvips.Image.new_from_source(source, "", access=access, **options)

    try:
        image = opened("sequential")
        loader = image.get("vips-loader")
        if loader.startswith("jpeg") and image.get_typeof("orientation"):
            image = opened("random").autorot()  # decodes all rows to a temporary file
    except pyvips.Error:
        return None
    is_known = loader.startswith(_LOADERS) and image.interpretation in _INTERPRETATIONS
    return image if is_known and image.format in _DTYPES else None


def _is_plain_tiff(path: pathlib.Path, page: int | None) -> bool:
    """Returns whether libvips would decode a TIFF page exactly as `decode` does.

    Raises EOFError if the file is truncated.
    """
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        tags = tiff.pages[page or 0].aspage()
        ends = map(int.__add__, tags.dataoffsets, tags.databytecounts)
        if max(ends) > path.stat().st_size:  # libtiff may read missing bytes as black
            raise EOFError("it ends before its pixels do")
        return (
            tags.tags.valueof("Orientation", 1) == 1
            and tags.planarconfig == 1
            and tags.photometric != 0
            and tags.compression in _TIFF_COMPRESSIONS
            and tags.bitspersample in (1, 8, 16, 32, 64)
            and all(tags.databytecounts)  # no tile is omitted as empty
        )
