"""Images of any size, from the top down, a strip of rows at a time.

The pixels are those of `decode.read_image`, and images that are not large are read by it. What it
would decode otherwise than libvips does (CMYK, say) is read whole by it, too, whatever its size.
Interlaced PNG and progressive JPEG files are decoded whole by nature.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from dense_jax.data import decode

WHOLE = 2**25  # pixels up to which an image is read at once
STRIP = 2**22  # pixels of a strip, about
_COMPRESSIONS = (1, 5, 7, 8, 32773, 32946)  # none, LZW, JPEG, Deflate, PackBits; of TIFF
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


def strips(
    path: pathlib.Path,
    num_channels: int,
    *,
    page: int | None = None,
    value_range: decode.Range | None = None,
) -> Iterator[UInt8[np.ndarray, "_ w c"]]:
    """The rows of an image, in order. Raises ValueError, naming the file, where it is broken.

    The arguments are those of `decode.read_image`.
    """
    where = describe(path, page)
    with path.open("rb") as file:
        shape = decode.image_header(file, where, page)
        decode.check_channels(shape[2], where, num_channels)
        file.seek(0)
        by_rows = None
        if shape[0] * shape[1] > WHOLE:
            with decode.reading(where):
                by_rows = _by_rows(path, page, shape)
        if by_rows is None:
            yield decode.read_image(file, where, num_channels, page=page, value_range=value_range)
            return
    height = max(1, STRIP // shape[1])
    for start in range(0, shape[0], height):
        with decode.reading(where):
            pixels = by_rows(start, min(start + height, shape[0]))
        yield decode.to_channels(pixels, where, num_channels, value_range)


def describe(path: pathlib.Path, page: int | None) -> str:
    """What messages call a page of a file."""
    return str(path) if page is None else f"{path}, page {page}"


def _by_rows(
    path: pathlib.Path, page: int | None, shape: tuple[int, int, int]
) -> Callable[[int, int], Shaped[np.ndarray, "_ w c"]] | None:
    """A function of the first row and the one behind the last, or None if there is none."""
    h, w, c = shape
    with path.open("rb", buffering=0) as file:
        start = file.read(4)
        if start == b"\x93NUM":
            # Mapped anew for every strip, so that what was read does not stay in memory.
            return lambda start, stop: np.array(
                np.load(path, mmap_mode="r").reshape(shape)[start:stop]
            )
        file.seek(0)
        image = _open_vips(file.fileno(), page, is_tiff=start in decode.TIFF)
    if image is None or (image.height, image.width) != (h, w) or image.bands < c:
        return None
    if image.get("vips-loader").startswith("tiff") and not _is_plain_tiff(path, page):
        return None
    import pyvips

    region = pyvips.Region.new(image)

    def rows(start: int, stop: int) -> np.ndarray:
        pixels = np.frombuffer(region.fetch(0, start, w, stop - start), _DTYPES[image.format])
        return pixels.reshape(stop - start, w, image.bands)[..., :c]

    return rows


def _open_vips(descriptor: int, page: int | None, is_tiff: bool) -> Any:
    """The image as it is to stand, or None where libvips and `decode` may differ."""
    import pyvips  # few images are so large

    pyvips.cache_set_max(0)  # it would keep images, and rows of them that were read
    # Tiles that it cannot decode become black without an error, unless warnings are errors.
    options: dict[str, Any] = {"fail_on": "warning" if is_tiff else "error"}
    if page is not None:
        options["page"] = page

    def opened(access: str) -> Any:
        source = pyvips.Source.new_from_descriptor(descriptor)  # whatever the file is called
        return pyvips.Image.new_from_source(source, "", access=access, **options)

    try:
        image = opened("sequential")
        loader = image.get("vips-loader")
        if loader.startswith("jpeg") and image.get_typeof("orientation"):
            image = opened("random").autorot()  # through a temporary file, which has all rows
    except pyvips.Error:
        return None
    usual = ("b-w", "srgb", "gray16", "rgb16", "multiband")
    agreed = loader.startswith(("jpeg", "png", "tiff")) and image.interpretation in usual
    return image if agreed and image.format in _DTYPES else None


def _is_plain_tiff(path: pathlib.Path, page: int | None) -> bool:
    """Whether it is stored upright, pixel by pixel, 0 is not white, and libvips can decode it all.

    Raises EOFError if the file is cut.
    """
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        tags = tiff.pages[page or 0].aspage()
        ends = map(int.__add__, tags.dataoffsets, tags.databytecounts)
        if max(ends) > path.stat().st_size:  # libtiff may take what is missing for black
            raise EOFError("it ends before its pixels do")
        upright = tags.tags.valueof("Orientation", 1) == 1
        by_pixel = upright and tags.planarconfig == 1 and tags.photometric != 0
        return (
            by_pixel
            and tags.compression in _COMPRESSIONS
            and tags.bitspersample in (1, 8, 16, 32, 64)
            and all(tags.databytecounts)  # no tile left out as empty
        )
