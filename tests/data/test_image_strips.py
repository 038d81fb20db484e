"""Tests that images read in strips have the same pixels as in training."""

import contextlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from dense_jax.data import decode, image_strips

RNG = np.random.default_rng(0)
SMOOTH = np.kron(RNG.integers(0, 256, (6, 5, 3)), np.ones((8, 8, 1))).astype(np.uint8)
GRAY, ALPHA = SMOOTH[..., 0], np.dstack([SMOOTH, SMOOTH[..., :1]])
GRAY16 = GRAY.astype(np.uint16) * 250
MANY = RNG.integers(0, 60000, (50, 41, 5)).astype(np.uint16)
CONTIGUOUS = {"photometric": "minisblack", "planarconfig": "contig"}


def picture(pixels, mode=None, **options):
    image = Image.fromarray(pixels)
    return lambda path: (image.convert(mode) if mode else image).save(path, **options)


def turned(orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(SMOOTH, exif=exif, **options)


def tiff(pixels, **options):
    return lambda path: tifffile.imwrite(path, pixels, **options)


FILES = {
    "rgb.png": picture(SMOOTH),
    "gray.png": picture(GRAY),
    "alpha.png": picture(ALPHA),
    "gray_alpha.png": picture(ALPHA, "LA"),
    "16_bits.png": picture(GRAY16),
    "bits.png": picture(GRAY, "1"),
    "palette.png": picture(SMOOTH, "P"),
    "transparent_palette.png": picture(SMOOTH, "P", transparency=3),
    "rgb.jpg": picture(SMOOTH),
    "fine.jpg": picture(SMOOTH, quality=98, subsampling=0),
    "gray.jpg": picture(GRAY),
    "progressive.jpg": picture(SMOOTH, progressive=True),
    "cmyk.jpg": picture(SMOOTH, "CMYK"),
    **{f"{k}.jpg": turned(k) for k in range(1, 9)},
    "rgb.webp": picture(SMOOTH),
    "lossless.webp": picture(SMOOTH, lossless=True),
    "rgb.tif": picture(SMOOTH),
    "gray.tif": picture(GRAY),
    "palette.tif": picture(SMOOTH, "P"),
    "bits.tif": picture(GRAY, "1"),
    "cmyk.tif": picture(SMOOTH, "CMYK"),
    **{
        f"{name}.tif": picture(SMOOTH, compression=name)
        for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    },
    "turned.png": turned(6),
    "turned.tif": turned(6),
    "turned_16_bits.tif": tiff(GRAY16, extratags=[(274, "H", 1, 3, True)]),
    "tiled.tif": tiff(SMOOTH, photometric="rgb", tile=(16, 16), compression="zlib"),
    "alpha.tif": tiff(ALPHA, photometric="rgb"),
    "16_bits.tif": tiff(GRAY16),
    "16_bits_rgb.tif": tiff(MANY[..., :3], photometric="rgb", compression="zlib"),
    "white_is_0.tif": tiff(GRAY, photometric="miniswhite"),
    "white_is_0_16_bits.tif": tiff(GRAY16, photometric="miniswhite"),
    "many.tif": tiff(MANY, photometric="minisblack", planarconfig="contig"),
    "many_tiled.tif": tiff(MANY, photometric="minisblack", planarconfig="contig", tile=(16, 16)),
    "many_planes.tif": tiff(
        np.moveaxis(MANY, -1, 0), photometric="minisblack", planarconfig="separate"
    ),
    "big_endian.tif": tiff(GRAY16, byteorder=">"),
    "big.tif": tiff(GRAY16, bigtiff=True),
    "float.tif": tiff(GRAY16.astype(np.float32)),
    "lzw_16_bits.tif": tiff(GRAY16, compression="lzw", predictor=True),
    "lzw_float.tif": tiff(
        MANY.astype(np.float32), **CONTIGUOUS, compression="lzw", predictor=True, tile=(16, 16)
    ),
    "zstd.tif": tiff(MANY, **CONTIGUOUS, compression="zstd", tile=(16, 16)),
    "sparse.tif": lambda path: tifffile.imwrite(
        path,
        iter([MANY[:16, :16, 0], None] * 6),
        shape=(50, 41),
        dtype=np.uint16,
        photometric="minisblack",
        tile=(16, 16),
        compression="lzw",
    ),
    "jpeg_alpha.tif": tiff(ALPHA, **CONTIGUOUS, compression="jpeg"),
    "12_bits.tif": tiff(GRAY16 // 16, bitspersample=12, photometric="miniswhite"),
    "signed.tif": tiff(GRAY16.astype(np.int16), compression="lzw"),
    "signed_8_bits.tif": tiff(GRAY.astype(np.int8)),
    "gray.npy": lambda path: np.save(path, GRAY),
    "many.npy": lambda path: np.save(path, MANY),
    "fortran.npy": lambda path: np.save(path, np.asfortranarray(MANY)),
}


@pytest.fixture
def small(monkeypatch):
    """Every image is a large one, read by strips of about seven rows."""
    monkeypatch.setattr(image_strips, "WHOLE", 0)
    monkeypatch.setattr(image_strips, "STRIP", 7 * 41)


def read_all(path, num_channels, **options):
    parts = list(image_strips.strips(path, num_channels, **options))
    return np.concatenate(parts), len(parts)


WHOLE = (  # what libvips would decode otherwise, or does not decode by rows
    *("cmyk.jpg", "cmyk.tif", "white_is_0.tif", "white_is_0_16_bits.tif", "turned.tif"),
    *("turned_16_bits.tif", "many_planes.tif", "rgb.webp", "lossless.webp", "zstd.tif"),
    *("12_bits.tif", "sparse.tif"),
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "num_channels, dtype",
    [(1, "uint8"), (3, "uint8"), (4, "uint8"), (5, "uint8"), (1, "uint16"), (5, "float32")],
)
def test_strips_are_what_the_decoder_of_training_reads(small, tmp_path, name, num_channels, dtype):
    path = tmp_path / name
    FILES[name](path)
    options = {"value_range": (0, 60000), "dtype": dtype}
    with path.open("rb") as file:
        try:
            expected = decode.read_image(file, str(path), num_channels, **options)
        except ValueError as error:
            with pytest.raises(ValueError) as raised:
                read_all(path, num_channels, **options)
            assert str(raised.value) == str(error)
            return
    found, num_parts = read_all(path, num_channels, **options)
    np.testing.assert_array_equal(found, expected)
    assert (num_parts == 1) == (name in WHOLE)


def test_images_that_are_not_large_are_read_at_once(tmp_path):
    FILES["rgb.png"](tmp_path / "rgb.png")
    found, num_parts = read_all(tmp_path / "rgb.png", 3)
    assert num_parts == 1
    np.testing.assert_array_equal(found, SMOOTH)


def test_pages_are_those_that_were_written(small, tmp_path):
    path = tmp_path / "pages.tif"
    pages = [GRAY, GRAY[:30].astype(np.uint16), GRAY[:, ::-1]]
    with tifffile.TiffWriter(path) as writer:
        for page in pages:
            writer.write(page, photometric="minisblack")
    with path.open("rb") as file:
        assert decode.pages(file, str(path)) == [0, 1, 2]
    for number, page in enumerate(pages):
        found, _ = read_all(path, 1, page=number, value_range=(0, 255))
        np.testing.assert_array_equal(found[..., 0], page)
    with pytest.raises(ValueError, match=r"pages\.tif, page 3"):
        read_all(path, 1, page=3)


def test_smaller_copies_and_masks_are_no_pages(tmp_path):
    path = tmp_path / "overviews.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(SMOOTH, photometric="rgb")
        writer.write(SMOOTH[::2, ::2], photometric="rgb", subfiletype=1)
        writer.write(GRAY[::2, ::2] > 99, photometric="mask", subfiletype=4)
    with path.open("rb") as file:
        assert decode.pages(file, str(path)) == [0]


@pytest.mark.parametrize(
    "name",
    ["rgb.png", "rgb.jpg", "6.jpg", "tiff_lzw.tif", "many_tiled.tif", "many.npy", "float.tif"],
)
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_a_file_that_breaks_off_is_an_error_that_names_it(small, tmp_path, name, part):
    path = tmp_path / name
    FILES[name](path)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match=name):
        read_all(path, 3 if "many" not in name else 5, value_range=(0, 60000))


def test_a_damaged_tile_is_an_error_that_names_the_file(small, tmp_path):
    path = tmp_path / "damaged.tif"
    tifffile.imwrite(path, SMOOTH, photometric="rgb", compression="lzw", tile=(16, 16))
    with tifffile.TiffFile(path) as file:
        start = file.pages[0].dataoffsets[4]
    data = bytearray(path.read_bytes())
    data[start : start + 16] = RNG.bytes(16)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged\.tif: not a readable image"):
        read_all(path, 3)


def test_names_that_are_options_of_libvips_or_no_text_are_read(small, tmp_path):
    for name in ("a[page=2].png", "ä b,c.png", "\udcff.png"):
        path = tmp_path / name
        with contextlib.suppress(OSError):  # some file systems take no such name
            path.touch()
            with path.open("wb") as file:
                Image.fromarray(SMOOTH).save(file, "PNG")
            found, _ = read_all(path, 3)
            np.testing.assert_array_equal(found, SMOOTH)
