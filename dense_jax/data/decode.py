"""Decodes image and label files into arrays. Every error is a ValueError that names the file.

In all functions, `file` is an open binary file, `where` is the file's name in messages, and `page`
is the index of an image in a multi-page file. If `page` is None, the file must hold one image.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Int32, Shaped
from PIL import ExifTags, Image, ImageFile, ImageMode, PngImagePlugin, UnidentifiedImageError

from dense_jax.labels import IGNORE_LABEL

if TYPE_CHECKING:
    import tifffile

BinaryFile = io.BytesIO | io.BufferedReader
InMemory = Image.Image | np.ndarray  # an image [h, w] or [h, w, c] that is in no file
Range = Sequence[int | float]  # (low, high): the values that stand for gray levels 0 and 255
MAX_BYTES = 2**33  # the largest image that can be decoded
FLOAT32_MAX = float(np.finfo(np.float32).max)
GeoTags = tuple[tuple[int, int, int, Any, bool], ...]  # as tifffile writes them as `extratags`
GDAL_NODATA = 42113  # the tag with the value of missing pixels, as text
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes of TIFF and BigTIFF

_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")  # formats that Pillow may open
_GRAY_MODES = ("1", "L", "LA")
_UNDECLARED = -1
# The tags that place an image on the earth: ModelPixelScale, ModelTiepoint, ModelTransformation,
# GeoKeyDirectory, GeoDoubleParams and GeoAsciiParams (OGC 19-008r4, GeoTIFF 1.1).
_GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)

Image.MAX_IMAGE_PIXELS = None  # MAX_BYTES replaces Pillow's limit


class Header(NamedTuple):
    """The size of an image in pixels, its number of channels, and the type of its values.

    nodata: The value of missing pixels in a TIFF file that GDAL wrote, or None; see `convert`.
    geo_tags: The tags of a GeoTIFF file that place the image on the earth.
    """

    height: int
    width: int
    channels: int
    dtype: np.dtype
    nodata: float | None = None
    geo_tags: GeoTags = ()


class _Opened(NamedTuple):
    """An open image. The header has been read, but the pixels have not been decoded."""

    stored: tuple[int, int, int]  # height, width and channels in the file
    dtype: np.dtype  # of the values in the file
    decode: Callable[[], np.ndarray]  # returns the pixels as stored, in the stored dtype
    orientation: int = 1  # EXIF orientation, 1 to 8
    nodata: float | None = None
    geo_tags: GeoTags = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Returns the height, width and number of channels, after applying the EXIF orientation."""
        h, w, c = self.stored
        return (w, h, c) if self.orientation >= 5 else (h, w, c)

    def pixels(self) -> Shaped[np.ndarray, "h w c"]:
        """Decodes the image and applies its EXIF orientation."""
        pixels, orientation = self.decode().reshape(self.stored), self.orientation
        if orientation >= 5:
            pixels, orientation = pixels.swapaxes(0, 1), orientation - 4
        rows = -1 if orientation in (3, 4) else 1
        columns = -1 if orientation in (2, 3) else 1
        return np.ascontiguousarray(pixels[::rows, ::columns])


def image_header(
    file: BinaryFile, where: str, page: int | None = None, max_pixels: float = math.inf
) -> Header:
    """Returns the header of an image, without decoding the image."""
    with reading(where):
        opened = _open(file, page)
        h, w, c = opened.shape
    if h * w > max_pixels:
        raise ValueError(
            f"{where}: has {h} x {w} pixels (height x width), more than {max_pixels / 1e6:g} "
            "megapixels; if that is right, raise --max_megapixels"
        )
    return Header(h, w, c, opened.dtype.newbyteorder("="), opened.nodata, opened.geo_tags)


def pages(file: BinaryFile, where: str) -> Sequence[int | None]:
    """Returns the indices of a TIFF file's image pages, or [None] for any other file."""
    with reading(where):
        if _start(file) not in TIFF:
            return [None]
        numbers = _image_pages(_open_tiff(file))
        file.seek(0)
        return numbers


def read_image(
    file: BinaryFile | InMemory,
    where: str,
    num_channels: int,
    *,
    page: int | None = None,
    dtype: str = "uint8",
    value_range: Range | None = None,
) -> Shaped[np.ndarray, "h w c"]:
    """Decodes an image and applies its orientation. Drops alpha channels, except in TIFF files.

    If `num_channels` is 3, gray images become RGB. If `num_channels` is 1, RGB images become gray.
    If the file declares a nodata value, the result is a masked array; see `convert`.

    file: An image file, or an image in memory. An array is read like a .npy file, and a Pillow
      image like the PNG, JPEG or WebP file that it was opened from, or else like a PNG file.
    dtype: The type of the result, "uint8", "uint16" or "float32". Values stay as they are in the
      file, unless only one of file and result is 8-bit.
    value_range: The values that stand for 0 and 255 of 8-bit images. If only the file is 8-bit, 0
      and 255 become these values (without a range, values stay as they are). If only the result is
      8-bit, these values become 0 and 255, and values outside the range are clipped.

    Raises ValueError if values cannot be converted to `dtype`, or are NaN or infinite.
    """
    with reading(where):
        opened = _open(file, page)
    check_channels(opened.shape[2], where, num_channels)
    with reading(where):
        _check_bytes(math.prod(opened.shape) * opened.dtype.itemsize)
        pixels = opened.pixels()
    return convert(pixels, where, num_channels, dtype, value_range, opened.nodata)


def check_channels(c: int, where: str, num_channels: int) -> None:
    """Raises ValueError if `convert` cannot convert c channels to `num_channels` channels."""
    if c != num_channels and {c, num_channels} != {1, 3}:
        raise ValueError(f"{where}: has {c} channels, but {num_channels} are needed")


def _check_bytes(num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise ValueError(
            f"its pixels take {num_bytes / 2**30:.1f} GiB, more than the {MAX_BYTES / 2**30:g} GiB "
            "that are read at once; cut it into smaller images"
        )


def convert(
    pixels: Shaped[np.ndarray, "h w _"],
    where: str,
    num_channels: int,
    dtype: str = "uint8",
    value_range: Range | None = None,
    nodata: float | None = None,
) -> Shaped[np.ndarray, "h w c"]:
    """Converts decoded rows of an image to a dtype and a number of channels; see `read_image`.

    nodata: The value of missing data in each channel, possibly NaN, or None. If it is not None, the
      result is a NumPy masked array, in which pixels that have this value in all channels are
      masked and 0. In float images, this value also becomes 0 where only some channels have it.
    """
    if nodata is not None:
        with np.errstate(over="ignore"):  # the value may lie outside the dtype
            missing = np.isnan(pixels) if math.isnan(nodata) else pixels == nodata
        masked = missing.all(axis=2, keepdims=True)
        pixels = np.where(missing if pixels.dtype.kind == "f" else masked, 0, pixels)
        converted = convert(pixels, where, num_channels, dtype, value_range)
        return np.ma.array(converted, mask=np.broadcast_to(masked, converted.shape))
    c = pixels.shape[2]
    pixels = _to_dtype(pixels, where, dtype, value_range)
    if (c, num_channels) == (1, 3):
        return np.repeat(pixels, 3, axis=2)
    if (c, num_channels) != (3, 1):
        return pixels
    if dtype == "uint8":
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    luma = pixels @ np.array([[0.299], [0.587], [0.114]])  # ITU-R BT.601, as Pillow has it
    return (luma.round() if dtype == "uint16" else luma).astype(dtype)


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """A context manager that turns any exception into a ValueError that names the file."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{where}: not a readable image (none of {', '.join(_FORMATS)} and NumPy)"
        ) from error
    except Exception as error:  # corrupt files can cause any exception
        raise ValueError(f"{where}: not a readable image ({error})") from error


def _start(file: BinaryFile) -> bytes:
    start = file.read(4)
    file.seek(0)
    return start


def _open(file: BinaryFile | InMemory, page: int | None) -> _Opened:
    if isinstance(file, np.ndarray):
        return _open_array(file.shape, file.dtype, lambda: file)
    if isinstance(file, Image.Image):
        return _open_picture(file)
    start = _start(file)
    if start == b"\x93NUM":
        return _open_numpy(file)
    if start not in TIFF:
        return _open_picture(_open_pillow(file, page))
    tiff = _open_tiff(file)
    if page is None:
        numbers = _image_pages(tiff)
        _check_single(len(numbers))
        page = numbers[0]
    tags = tiff.pages[page].aspage()
    if tags.photometric > 2 or tags.bitspersample < 8:  # palettes, CMYK, YCbCr, masks etc.
        file.seek(0)
        opened = _open_picture(_open_pillow(file, page))
    else:
        opened = _open_tiff_page(tags)
    return opened._replace(nodata=_nodata(tags), geo_tags=_geo_tags(tags))


def _nodata(tags: "tifffile.TiffPage") -> float | None:
    """Returns the value of missing pixels, or None if there is none or it is no decoded value."""
    if tags.photometric not in (1, 2, 6) or tags.bitspersample < 8:  # palette indices etc.
        return None
    try:
        return float(tags.tags.valueof(GDAL_NODATA, "").strip("\0 "))
    except (AttributeError, ValueError):  # no text, or no number
        return None


def _geo_tags(tags: "tifffile.TiffPage") -> GeoTags:
    """Returns the tags that place an image on the earth. They do not describe a rotated image."""
    if tags.tags.valueof("Orientation", 1) != 1:
        return ()
    present = (tag for code in _GEO_TAGS if (tag := tags.tags.get(code)) is not None)
    values = ((tag, tag.value) for tag in present)
    return tuple(
        (tag.code, int(tag.dtype), tag.count, v.encode() if isinstance(v, str) else v, True)
        for tag, v in values
    )


def _check_single(num_pages: int) -> None:
    if num_pages > 1:
        raise ValueError(
            f"holds {num_pages} pages; save each as a file of its own or, if they are channels, "
            "all as one .npy array [h, w, c]"
        )


def _open_numpy(file: BinaryFile) -> _Opened:
    is_first = np.lib.format.read_magic(file) == (1, 0)
    read_header = "read_array_header_1_0" if is_first else "read_array_header_2_0"
    shape, _, dtype = getattr(np.lib.format, read_header)(file)
    file.seek(0)
    return _open_array(shape, dtype, lambda: np.load(file))


def _open_array(
    shape: tuple[int, ...], dtype: np.dtype, decode: Callable[[], np.ndarray]
) -> _Opened:
    h, w, c = shape if len(shape) == 3 else (*shape, 1) if len(shape) == 2 else (0, 0, 0)
    if 0 in (h, w, c) or dtype.kind not in "buif":
        raise ValueError(f"an array must hold numbers [h, w] or [h, w, c], not {dtype} {shape}")
    return _Opened((h, w, c), dtype, decode)


def _open_tiff(file: BinaryFile) -> "tifffile.TiffFile":
    import tifffile  # few datasets need it

    return tifffile.TiffFile(file)


def _image_pages(tiff: "tifffile.TiffFile") -> list[int]:
    """Returns the indices of a TIFF file's pages.

    Omits masks and thumbnails, unless the file has no other pages.
    """
    pages = [page.aspage() for page in tiff.pages]
    images = [k for k, page in enumerate(pages) if not (page.is_reduced or page.is_mask)]
    return images or list(range(len(pages)))


def _open_tiff_page(tags: "tifffile.TiffPage") -> _Opened:
    """Opens a TIFF page with any number of channels of at least 8 bits each.

    Keeps alpha channels because GDAL tags any fourth channel as alpha.
    """
    c, dtype = tags.samplesperpixel, tags.dtype
    is_white_0 = tags.tags.valueof("PhotometricInterpretation") == 0
    if dtype is None:
        raise ValueError(
            f"{tags.bitspersample} bits per value cannot be read; save it with 8 or 16"
        )
    if is_white_0 and dtype.kind != "u":
        raise ValueError(f"0 is white, which has no meaning for {dtype}; save it with 0 black")

    def decode() -> np.ndarray:
        pixels = tags.asarray()
        pixels = np.moveaxis(pixels, 0, -1) if tags.axes == "SYX" else np.atleast_3d(pixels)
        if is_white_0:
            pixels[..., : c - len(tags.extrasamples)] ^= dtype.type(2**tags.bitspersample - 1)
        return pixels

    stored = tags.imagelength, tags.imagewidth, c
    orientation = _orientation(tags.tags.valueof("Orientation"))
    return _Opened(stored, dtype, decode, orientation)


def _orientation(value: Any) -> int:
    """Returns `value` if it is a valid EXIF orientation (1 to 8), otherwise 1 (stored upright)."""
    return value if value in range(1, 9) else 1


def _open_picture(image: Image.Image) -> _Opened:
    """Opens a Pillow image. A gray image decodes to gray, any other image to 8-bit RGB."""
    is_png = isinstance(image, PngImagePlugin.PngImageFile)
    if is_png and image.mode[0] != "I" and ";16" in str(image.tile):
        raise ValueError("Pillow reads only 8 of its 16 bits per channel; save it as .tif or .npy")
    mode = "L" if image.mode in _GRAY_MODES else "RGB"
    if image.mode[0] in "IF":  # more than 8 bits of gray
        mode = image.mode
    orientation = 1
    # Pillow itself rotates TIFF images. The orientation in PNG files is ignored because it may be
    # stored after the pixels.
    if image.format in ("JPEG", "MPO", "WEBP"):
        orientation = _orientation(image.getexif().get(ExifTags.Base.Orientation))

    def decode() -> np.ndarray:
        is_transparent = image.mode == "P" and "transparency" in image.info
        opaque = image.convert("RGBA") if is_transparent else image  # direct RGB conversion warns
        return np.asarray(opaque if opaque.mode == mode else opaque.convert(mode))

    stored = image.height, image.width, 3 if mode == "RGB" else 1
    return _Opened(stored, np.dtype(ImageMode.getmode(mode).typestr), decode, orientation)


def _open_pillow(file: BinaryFile, page: int | None) -> ImageFile.ImageFile:
    image = Image.open(file, formats=_FORMATS)
    if page is not None:
        image.seek(page)
    elif image.format != "MPO":  # a camera's JPEG; its other frames are previews
        _check_single(getattr(image, "n_frames", 1))
    return image


def _to_dtype(
    pixels: Shaped[np.ndarray, "h w c"], where: str, dtype: str, value_range: Range | None
) -> Shaped[np.ndarray, "h w c"]:
    """Converts the values of an image to `dtype`; see `read_image`."""
    stored = pixels.dtype
    if stored == np.uint8 and dtype == "uint8":
        return pixels
    low, high = pixels.min(), pixels.max()
    if not all(abs(float(value)) <= FLOAT32_MAX for value in (low, high)):
        raise ValueError(
            f"{where}: holds NaN or infinite values; save it with numbers in their place "
            "(numpy.nan_to_num), and give their pixels one of the labels' ignored_values"
        )
    if dtype == "uint8":
        if value_range is None:
            raise ValueError(f"{where}: holds {values_without_range(stored, low, high)}")
        low, high = value_range
        scaled = (pixels.astype(np.float64) - low) * (255 / (high - low))
        return scaled.round().clip(0, 255).astype(np.uint8)
    if stored == np.uint8 and value_range is not None:
        low, high = value_range
        pixels = low + pixels * ((high - low) / 255)
        pixels = pixels.round().clip(0, 2**16 - 1) if dtype == "uint16" else pixels
    with np.errstate(invalid="ignore"):  # the comparison below finds values outside uint16
        converted = pixels.astype(dtype)
    if dtype == "uint16" and not np.array_equal(converted, pixels):
        raise ValueError(
            f"{where}: holds {stored} values, but the training images hold uint16 values; convert it "
            "to whole numbers from 0 to 65535"
        )
    return converted


def values_without_range(dtype: np.dtype | str, low: Any, high: Any) -> str:
    """Returns what to do about images with values from `low` to `high` that lack a range."""
    return (
        f"{dtype} values from {low} to {high}, not 8 bits; write into dataset.json which "
        'values become 0 and 255 in all images: "range": [LOW, HIGH]'
    )


def label_table(
    values: Sequence[int | Sequence[int]], ignored_values: Sequence[int]
) -> Int32[np.ndarray, "65536"]:
    """Returns a lookup table from raw label values to classes.

    values: values[i] is the raw value, or the tuple of raw values, of class i.
    """
    table = np.full(2**16, _UNDECLARED, np.int32)
    table[list(ignored_values)] = IGNORE_LABEL
    for i, raw in enumerate(values):
        table[raw if isinstance(raw, int) else list(raw)] = i
    return table


def read_label(
    file: BinaryFile, where: str, table: Int32[np.ndarray, "65536"], page: int | None = None
) -> Int32[np.ndarray, "h w"]:
    """Decodes a label file and maps its raw values to classes with a `label_table`.

    Supports gray values, palette indices, and MATLAB files from the Semantic Boundaries Dataset.
    """
    hint = ""
    with reading(where):
        if _start(file) == b"MATL":
            import scipy.io  # few datasets need it

            raw = scipy.io.loadmat(file)["GTcls"]["Segmentation"][0, 0]
            mode = raw.dtype
        else:
            image = _open_pillow(file, page)
            _check_bytes(2 * image.width * image.height)
            mode, hint = image.mode, _hint_of_bits(image)
            raw = np.asarray(image)
    if raw.ndim != 2 or raw.dtype not in (np.bool_, np.uint8, np.uint16):
        raise ValueError(
            f"{where}: a label has one channel of 8 or 16 bits, this one is mode {mode!r}; "
            "save raw class values or palette indices"
        )
    label = cv2.LUT(raw, table[:256]) if raw.dtype == np.uint8 else np.take(table, raw)
    if label.min() == _UNDECLARED:
        raise ValueError(f"{where}: {_undeclared(raw, table)}{hint}")
    return label


def _hint_of_bits(image: ImageFile.ImageFile) -> str:
    """Returns a hint for images with fewer than 8 bits per gray value, or "" for other images."""
    if image.mode == "1":
        return ". This file has 1 bit per pixel: black is 0 and white is 1"
    for bits, step in ((2, 85), (4, 17)):
        if f"'L;{bits}" in str(image.tile):
            return (
                f". This file has {bits} bits per pixel: the values in it are read {step} times as "
                "large. List these, or save it with 8 bits"
            )
    return ""


def _undeclared(raw: np.ndarray, table: np.ndarray) -> str:
    """Returns the error message for a label with raw values that are missing from `table`."""
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
    """Raises ValueError if an image [h, w, c] and its label [h, w] differ in height or width."""
    if image.shape[:2] != label.shape:
        turned = image.shape[:2] == label.shape[::-1]
        raise ValueError(
            f"{where}: the image has {image.shape[0]} x {image.shape[1]} pixels "
            f"(height x width), its label {label.shape[0]} x {label.shape[1]}"
            + turned
            * "; if the image's EXIF orientation rotates it, rotate the label, too"
        )
