"""Tests decoding image files of every depth, number of channels and orientation."""

import io
import struct
import zlib

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
    """Reads an image and checks that its header agrees."""
    h, w, *_ = decode.image_header(file, "the file")
    file.seek(0)
    image = decode.read_image(file, "the file", num_channels, **options)
    assert image.dtype == options.get("dtype", "uint8") and image.shape == (h, w, num_channels)
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
    assert decode.image_header(file, "the file")[:4] == (6, 7, num_channels, dtype)
    file.seek(0)
    np.testing.assert_array_equal(read(file, num_channels, value_range=(0, 255)), pixels)


def test_a_fourth_channel_of_a_tiff_is_kept_and_alpha_of_a_png_is_not():
    pixels = RNG.integers(0, 256, (3, 4, 4)).astype(np.uint8)
    np.testing.assert_array_equal(read(tiff(pixels, photometric="rgb"), 4), pixels)
    np.testing.assert_array_equal(read(picture(pixels, "PNG"), 3), pixels[..., :3])


@pytest.mark.parametrize("compression", ["lzw", "zlib", "zstd", "lzma", "packbits"])
@pytest.mark.parametrize(
    "dtype, num_channels, tile",
    [(np.uint16, 1, None), (np.float32, 3, (16, 16)), (np.uint8, 4, (16, 16)), (np.uint8, 3, None)],
)
def test_compressed_tiffs_of_any_depth_and_channels(compression, dtype, num_channels, tile):
    pixels = RNG.integers(0, 256, (40, 50, num_channels)).astype(dtype)
    file = tiff(
        pixels.squeeze(),
        photometric="rgb" if num_channels == 3 else "minisblack",
        planarconfig="contig" if num_channels > 1 else None,
        compression=compression,
        predictor=compression in ("lzw", "zlib", "zstd"),
        tile=tile,
    )
    np.testing.assert_array_equal(read(file, num_channels, value_range=(0, 255)), pixels)


def test_jpeg_in_a_tiff_of_four_channels():
    pixels = np.full((16, 16, 4), 90, np.uint8)
    file = tiff(pixels, photometric="minisblack", planarconfig="contig", compression="jpeg")
    np.testing.assert_allclose(read(file, 4), pixels, atol=2)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_white_is_0_in_gray_tiffs_of_any_depth(bits):
    black, white = 0, 2**bits - 1
    dtype = np.uint8 if bits == 8 else np.uint16
    stored = np.array([[white, black, black]], dtype)
    file = tiff(stored, photometric="miniswhite", bitspersample=bits)
    image = read(file, 1, value_range=(0, white))
    np.testing.assert_array_equal(image[..., 0], [[0, 255, 255]])


def test_channels_beside_gray_are_not_inverted_with_it():
    pixels = RNG.integers(0, 256, (6, 7, 3)).astype(np.uint8)
    image = read(tiff(pixels, photometric="miniswhite", planarconfig="contig"), 3)
    np.testing.assert_array_equal(image, np.dstack([255 - pixels[..., :1], pixels[..., 1:]]))


def test_white_is_0_has_no_meaning_for_floats():
    with pytest.raises(ValueError, match=r"the file: .*0 is white.*float32"):
        read(tiff(np.zeros((2, 3), np.float32), photometric="miniswhite"), 1)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_compressed_tiffs_of_8_bits(compression):
    pixels = np.full((16, 16, 3), 90, np.uint8)
    np.testing.assert_allclose(
        read(picture(pixels, "TIFF", compression=compression), 3), pixels, atol=2
    )


def test_an_array_without_channels_is_gray():
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
        with pytest.raises(ValueError, match=r"the file: holds NaN or infinite .*nan_to_num"):
            read(make(pixels), 1, value_range=(-1.0, 1.0))


@pytest.mark.parametrize("make", [tiff, array, lambda x: picture(x, "PNG")])
def test_values_of_16_bits_stay_as_they_are(make):
    pixels = RNG.integers(0, 2**16, (3, 4)).astype(np.uint16)
    for dtype in ("uint16", "float32"):
        for limits in (None, (5, 4095)):
            image = read(make(pixels), 1, dtype=dtype, value_range=limits)
            np.testing.assert_array_equal(image[..., 0], pixels)


@pytest.mark.parametrize("stored", [np.float64, np.int32, bool, ">u2", ">f4"])
def test_any_numbers_become_floats(stored):
    pixels = RNG.integers(0, 2, (3, 4)).astype(stored)
    assert decode.image_header(array(pixels), "").dtype == pixels.dtype.newbyteorder("=")
    np.testing.assert_array_equal(read(array(pixels), 1, dtype="float32")[..., 0], pixels)


def test_an_8_bit_image_among_others_has_the_range_of_the_others():
    pixels = np.array([[0, 51, 255]], np.uint8)
    for dtype, limits, expected in (
        ("float32", (-1, 4), [-1, 0, 4]),
        ("uint16", (1000, 1099), [1000, 1020, 1099]),
        ("uint16", None, [0, 51, 255]),
    ):
        image = read(array(pixels), 1, dtype=dtype, value_range=limits)
        np.testing.assert_array_equal(image[..., 0], [expected])


@pytest.mark.parametrize("value", [0.5, -1.0, 65536.0])
def test_values_that_uint16_does_not_have_are_refused(value):
    with pytest.raises(ValueError, match=r"the file: holds float64 values, .*uint16"):
        read(array(np.full((2, 3), value)), 1, dtype="uint16")


def test_numbers_too_large_for_float32_are_refused():
    with pytest.raises(ValueError, match="the file: holds NaN or infinite"):
        read(array(np.full((2, 3), 1e39)), 1, dtype="float32")


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_the_luma_of_16_bits_is_that_of_8(dtype):
    pixels = RNG.integers(0, 256, (8, 9, 3)).astype(np.uint8)
    gray = read(array(pixels * np.uint16(100)), 1, dtype=dtype) / 100
    np.testing.assert_allclose(gray, read(array(pixels), 1), atol=0.52)


def test_8_bits_are_not_scaled():
    pixels = np.array([[0, 7, 255]], np.uint8)
    np.testing.assert_array_equal(read(array(pixels), 1, value_range=(0, 7))[..., 0], pixels)


def stored_in(orientation, upright):
    """Returns the pixels that a camera stores if it is held that way."""
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind):
    """The upright image is bright at the top left."""
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = stored_in(orientation, upright)
    image = read(picture(np.ascontiguousarray(stored), kind, exif=exif), 1)
    assert image.shape == (16, 32, 1)
    assert np.abs(image[..., 0].astype(int) - upright).max() < 40


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("num_channels", [1, 3, 4])
def test_tiffs_of_any_depth_are_turned_as_they_say(orientation, dtype, num_channels):
    upright = RNG.integers(0, 256, (5, 7, num_channels)).astype(dtype)
    stored = np.stack([stored_in(orientation, x) for x in np.moveaxis(upright, -1, 0)], axis=-1)
    file = tiff(
        stored.squeeze(),
        photometric="rgb" if num_channels == 3 else "minisblack",
        planarconfig="contig" if num_channels > 1 else None,
        extratags=[(274, "H", 1, orientation, True)],
    )
    np.testing.assert_array_equal(read(file, num_channels, value_range=(0, 255)), upright)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_an_orientation_that_there_is_not_is_none(kind):
    exif = Image.Exif()
    exif[0x0112] = 9
    image = read(picture(np.full((4, 6), 90, np.uint8), kind, exif=exif), 1)
    assert image.shape == (4, 6, 1)


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


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("first", ["image", "thumbnail"])
def test_smaller_copies_and_masks_are_no_pages(dtype, first):
    pixels = RNG.integers(0, 256, (8, 10, 3)).astype(dtype)
    images = [
        {"data": pixels, "photometric": "rgb"},
        {"data": pixels[::2, ::2], "photometric": "rgb", "subfiletype": 1},
    ]
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for image in images if first == "image" else images[::-1]:
            writer.write(**image)
        writer.write(pixels[..., 0] > 9, photometric="mask", subfiletype=4)
    file.seek(0)
    assert decode.pages(file, "the file") == [0 if first == "image" else 1]
    np.testing.assert_array_equal(read(file, 3, value_range=(0, 255)), pixels)


def test_a_copy_without_its_original_is_an_image():
    pixels = RNG.integers(0, 256, (4, 5)).astype(np.uint8)
    file = tiff(pixels, subfiletype=1)
    assert decode.pages(file, "the file") == [0]
    np.testing.assert_array_equal(read(file, 1)[..., 0], pixels)


def test_arrays_of_every_version_of_their_format():
    pixels = RNG.integers(0, 256, (3, 4, 5)).astype(np.uint8)
    for version in ((1, 0), (2, 0), (3, 0)):
        file = io.BytesIO()
        np.lib.format.write_array(file, pixels, version)
        file.seek(0)
        np.testing.assert_array_equal(read(file, 5), pixels)


def test_the_number_of_channels_is_compared_before_decoding(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr(np, "load", refuse)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", refuse)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    pixels = np.zeros((2, 3, 4), np.uint8)
    for file in (array(pixels), tiff(pixels, photometric="rgb"), picture(pixels, "PNG")):
        with pytest.raises(ValueError, match=r"the file: has [34] channels, but 7 are needed"):
            decode.read_image(file, "the file", 7)


def test_more_than_fits_into_memory_is_refused_before_decoding(monkeypatch):
    """Height, width, channels and bytes per value all count."""
    monkeypatch.setattr(decode, "MAX_BYTES", 2 * 3 * 4 * 2)
    good = RNG.integers(0, 256, (2, 3, 4)).astype(np.uint16)
    for dtype, repeats in ((np.uint32, 1), (np.uint16, 2)):
        pixels = np.repeat(good, repeats, axis=0).astype(dtype)
        for make in (array, lambda x: tiff(x, photometric="rgb")):
            np.testing.assert_array_equal(read(make(good), 4, value_range=(0, 255)), good)
            with pytest.raises(ValueError, match=r"the file: .*GiB.*cut it into smaller images"):
                decode.read_image(make(pixels), "the file", 4, value_range=(0, 255))
    large = np.zeros((5, 10), np.uint8)
    with pytest.raises(ValueError, match=r"the file: .*GiB"):
        decode.read_image(picture(large, "PNG"), "the file", 1)
    with pytest.raises(ValueError, match=r"the file: .*GiB"):
        decode.read_label(picture(large, "PNG"), "the file", decode.label_table([0], []))


# DeepForest#1324, MONAILabel#1230
def test_200_megapixels_are_read_without_a_warning():
    file = picture(np.zeros((10_000, 20_000), bool), "PNG", compress_level=1)
    assert decode.image_header(file, "the file")[:4] == (10_000, 20_000, 1, np.uint8)


@pytest.mark.parametrize("kind", ["GIF", "PPM", "BMP", "EPS"])
def test_other_formats_are_refused_whatever_the_file_is_called(kind):
    file = picture(np.zeros((2, 3, 3), np.uint8), kind)
    message = "the file: not a readable image .*PNG, JPEG, WEBP"
    with pytest.raises(ValueError, match=message):
        decode.image_header(file, "the file")
    with pytest.raises(ValueError, match=message):
        decode.read_label(file, "the file", decode.label_table([0], []))


@pytest.mark.parametrize(
    "bits, words", [(1, "1 bit .*white is 1"), (2, "85 times"), (4, "17 times")]
)
def test_a_label_of_few_bits_says_how_it_is_read(bits, words):
    """Pillow can read such a gray PNG, but not write it."""
    data = zlib.compress(bytes([0, 0xFF]))
    file = png(struct.pack(">IIBBBBB", 8 // bits, 1, bits, 0, 0, 0, 0), data)
    with pytest.raises(ValueError, match=f"the file: label values .*{words}"):
        decode.read_label(file, "the file", decode.label_table([0], []))


def test_a_label_that_lies_on_its_side_hints_at_the_orientation():
    for shape, says in (((3, 2), True), ((4, 2), False)):
        with pytest.raises(ValueError, match="x: the image has 2 x 3") as error:
            decode.check_same_size(np.zeros((2, 3, 1)), np.zeros(shape), "x")
        assert ("orientation" in str(error.value)) == says


def color_of_16_bits() -> io.BytesIO:
    """A PNG that Pillow can read but not write."""
    data = zlib.compress(b"\0" + struct.pack(">HHH", 300, 2, 3))
    return png(struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), data)


def png(header, data) -> io.BytesIO:
    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

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
        (color_of_16_bits(), "16 bits.*tif or .npy"),
        (array(np.zeros((2, 3, 5), np.uint8)), "has 5 channels, but 3"),
    ],
)
def test_errors_name_the_file(file, words):
    with pytest.raises(ValueError, match=f"the file: .*{words}"):
        decode.read_image(file, "the file", 3)
