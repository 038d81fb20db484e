"""Image files of every depth, number of channels and orientation, as bytes."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from dense_jax.data import decode

RNG = np.random.default_rng(0)


def picture(pixels, kind, **options) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    file.seek(0)
    return file


def tiff(pixels, **options) -> io.BytesIO:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    file.seek(0)
    return file


def array(pixels) -> io.BytesIO:
    file = io.BytesIO()
    np.save(file, pixels)
    file.seek(0)
    return file


def read(file, num_channels, **options):
    """Reads an image after its header, which must agree."""
    h, w, _ = decode.image_header(file, "the file")
    file.seek(0)
    image = decode.read_image(file, "the file", num_channels, **options)
    assert image.dtype == np.uint8 and image.shape == (h, w, num_channels)
    return image


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("kind", ["contig", "separate", "npy"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_any_number_of_channels(num_channels, kind, dtype):
    pixels = RNG.integers(0, 256, (6, 7, num_channels)).astype(dtype)
    if kind == "npy":
        file = array(pixels)
    elif num_channels == 1:
        file = tiff(pixels[..., 0])
    elif kind == "contig":
        file = tiff(pixels, photometric="minisblack", planarconfig="contig")
    else:
        file = tiff(np.moveaxis(pixels, -1, 0), photometric="minisblack", planarconfig="separate")
    assert decode.image_header(file, "the file") == (6, 7, num_channels)
    file.seek(0)
    np.testing.assert_array_equal(read(file, num_channels, value_range=(0, 255)), pixels)


def test_a_fourth_channel_of_a_tiff_is_kept_and_alpha_of_a_png_is_not():
    pixels = RNG.integers(0, 256, (3, 4, 4)).astype(np.uint8)
    np.testing.assert_array_equal(read(tiff(pixels, photometric="rgb"), 4), pixels)
    np.testing.assert_array_equal(read(picture(pixels, "PNG"), 3), pixels[..., :3])


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_compressed_tiffs_of_8_bits(compression):
    pixels = np.full((16, 16, 3), 90, np.uint8)
    np.testing.assert_allclose(
        read(picture(pixels, "TIFF", compression=compression), 3), pixels, atol=2
    )


def test_an_array_without_channels_is_grey():
    pixels = RNG.integers(0, 256, (3, 4)).astype(np.uint8)
    np.testing.assert_array_equal(read(array(pixels), 1)[..., 0], pixels)
    np.testing.assert_array_equal(read(array(pixels), 3), np.stack([pixels] * 3, axis=-1))


@pytest.mark.parametrize(
    "make", [tiff, array, lambda pixels: picture(pixels, "PNG")], ids=["tif", "npy", "png"]
)
def test_16_bits_are_scaled_by_the_range_and_clipped(make):
    pixels = np.array([[0, 100, 1000], [2000, 4100, 65535]], np.uint16)
    expected = [[0, 0, 57], [121, 255, 255]]  # of 255 * (x - 100) / 4000
    image = read(make(pixels), 1, value_range=(100, 4100))
    np.testing.assert_array_equal(image[..., 0], expected)
    with pytest.raises(ValueError, match=r'the file: .*from 0 to 65535.*"range": \[LOW, HIGH\]'):
        read(make(pixels), 1)


@pytest.mark.parametrize("make", [tiff, array])
def test_floats_are_scaled_by_the_range(make):
    pixels = np.array([[-1.5, -1.0, 0.0, 1.0, 7.0]], np.float32)
    image = read(make(pixels), 1, value_range=(-1.0, 1.0))
    np.testing.assert_array_equal(image[..., 0], [[0, 0, 128, 255, 255]])
    for wrong in (np.nan, np.inf):
        pixels[0, 2] = wrong
        with pytest.raises(ValueError, match="the file: holds NaN or infinite"):
            read(make(pixels), 1, value_range=(-1.0, 1.0))


def test_8_bits_are_not_scaled():
    pixels = np.array([[0, 7, 255]], np.uint8)
    np.testing.assert_array_equal(read(array(pixels), 1, value_range=(0, 7))[..., 0], pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind):
    """Bright at the top left once it stands as its EXIF data say."""
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    # What a camera held that way stores: the inverse of what undoes it.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    image = read(picture(np.ascontiguousarray(stored), kind, exif=exif), 1)
    assert image.shape == (16, 32, 1)
    assert np.abs(image[..., 0].astype(int) - upright).max() < 40


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("num_channels", [1, 3, 4])
def test_webp_is_what_pillow_makes_of_it(lossless, num_channels):
    pixels = np.repeat(np.repeat(RNG.integers(0, 256, (5, 6, num_channels)), 4, 0), 4, 1)
    file = picture(pixels.astype(np.uint8).squeeze(), "WEBP", lossless=lossless)
    expected = np.asarray(Image.open(file).convert("RGB"))
    file.seek(0)
    np.testing.assert_array_equal(read(file, 3), expected)
    cut = io.BytesIO(file.getvalue()[:-9])
    with pytest.raises(ValueError, match="the file: not a readable image"):
        decode.read_image(cut, "the file", 3)
    with pytest.raises(ValueError, match="the file"):
        decode.read_image(file, "the file", 3, page=1)


def test_an_animated_webp_is_refused():
    file = io.BytesIO()
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (0, 200)]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    file.seek(0)
    with pytest.raises(ValueError, match=r"the file: .*holds 2 pages"):
        read(file, 3)


def test_pages_are_read_one_by_one_only_where_asked_for():
    pixels = RNG.integers(0, 256, (3, 4, 5)).astype(np.uint8)
    for page in range(3):
        file = tiff(pixels, photometric="minisblack")
        image = decode.read_image(file, "the file", 1, page=page)
        np.testing.assert_array_equal(image[..., 0], pixels[page])
    with pytest.raises(ValueError, match=r"the file: .*holds 3 pages"):
        read(tiff(pixels, photometric="minisblack"), 1)
    with pytest.raises(ValueError, match="the file"):
        decode.read_image(tiff(pixels, photometric="minisblack"), "the file", 1, page=3)


def colour_of_16_bits() -> io.BytesIO:
    """A PNG that Pillow can read but not write."""
    import struct
    import zlib

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = zlib.compress(b"\0" + struct.pack(">HHH", 300, 2, 3))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize(
    "file, words",
    [
        (array(np.zeros((2, 3, 4, 5), np.uint8)), r"\[h, w, c\]"),
        (array(np.zeros((0, 3), np.uint8)), r"\[h, w, c\]"),
        (array(np.zeros((2, 3), np.complex64)), "complex64"),
        (array(np.array([["a"]])), "numbers"),
        (array(np.array([[None]])), "object"),
        (io.BytesIO(array(np.zeros((20, 30), np.uint8)).getvalue()[:300]), "not a readable image"),
        (io.BytesIO(tiff(np.zeros((20, 30, 5), np.uint16)).getvalue()[:100]), "not a readable"),
        (io.BytesIO(b"II*\0"), "not a readable"),
        (io.BytesIO(b""), "not a readable"),
        (colour_of_16_bits(), "16 bits.*tif or .npy"),
        (array(np.zeros((2, 3, 5), np.uint8)), "has 5 channels, but 3"),
    ],
)
def test_errors_name_the_file(file, words):
    with pytest.raises(ValueError, match=f"the file: .*{words}"):
        decode.read_image(file, "the file", 3)
