"""Writes image files a strip of rows at a time. Each file appears complete or not at all.

A file has a hidden temporary name until `publish` renames it. `Together` publishes all files of an
image or none. Does not import jax.
"""

import contextlib
import errno
import itertools
import struct
import zlib
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import UInt, UInt8

from dense_jax.class_colors import IGNORED_COLOR
from dense_jax.data.decode import GDAL_NODATA, GeoTags
from dense_jax.labels import IGNORE_LABEL

TILE = 256  # the height and width of the tiles of GeoTIFF files, in pixels
# Disk errors. They affect all files, not only the current one.
_ERRORS_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class Rows:
    """A file of `height` rows. Call `write` from top to bottom, then `publish` or `remove`."""

    def __init__(self, path: Path, height: int):
        self.path = path
        self._rows_left = height
        self._unfinished = path.with_name(f".{path.name}.tmp")
        self._file: IO[bytes] | None = None

    def write(self, rows: np.ndarray) -> None:
        """Appends rows. Opens the file on the first call and closes it after the last row."""
        if self._file is None:
            self._file = self._open()
        self._file.write(self._encode(rows))
        self._rows_left -= len(rows)
        if self._rows_left == 0:
            self._file.write(self._end())
            self._file.close()

    def _open(self) -> IO[bytes]:
        """Opens the temporary file and writes everything before the rows (the header)."""
        raise NotImplementedError

    def _encode(self, rows: np.ndarray) -> bytes | memoryview:
        """Returns the encoded bytes of the rows."""
        return np.ascontiguousarray(rows).data

    def _end(self) -> bytes:
        """Returns the bytes that follow the last row."""
        return b""

    def publish(self) -> None:
        """Renames a complete file to its final name."""
        self._unfinished = self._unfinished.replace(self.path)

    def remove(self) -> None:
        """Removes the file, whether temporary or published."""
        with contextlib.suppress(OSError):  # the disk may be full when the buffer is flushed
            if self._file is not None:
                self._file.close()
        with contextlib.suppress(OSError):  # the file may not exist
            self._unfinished.unlink()


class Png(Rows):
    """A PNG file with rows of palette indices or gray values [n, w], or RGB values [n, w, 3].

    bits: 8, or 16 for gray values uint16.

    Rows can be appended, which libvips (libvips#2859) and pypng do not support.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        *,
        rgb: bool = False,
        bits: int = 8,
        palette: UInt8[np.ndarray, "classes 3"] | None = None,
    ):
        super().__init__(path, size[0])
        self._compressor = zlib.compressobj(1)  # level 1: several times faster, not much larger
        color = 2 if rgb else 0 if palette is None else 3
        header = struct.pack(">IIBBBBB", size[1], size[0], bits, color, 0, 0, 0)
        self._start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)
        if palette is not None:
            self._start += _chunk(b"PLTE", palette.tobytes())

    def _open(self) -> IO[bytes]:
        file = self._unfinished.open("wb")
        file.write(self._start)
        return file

    def _encode(self, rows: UInt[np.ndarray, "n w *channels"]) -> bytes:
        """Returns compressed rows. RGB pixels become differences from their left neighbors."""
        big_endian = rows.astype(rows.dtype.newbyteorder(">"), copy=False)
        flat = np.ascontiguousarray(big_endian).view(np.uint8).reshape(len(rows), -1)
        filtered = np.pad(flat, ((0, 0), (1, 0)))
        if rows.ndim == 3:
            filtered[:, 0] = 1  # the number of filter Sub
            filtered[:, 4:] -= flat[:, :-3]
        return _chunk(b"IDAT", self._compressor.compress(filtered.data))

    def _end(self) -> bytes:
        return _chunk(b"IDAT", self._compressor.flush()) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(name))
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


class Array(Rows):
    """A float16 array [h, w, k] in a .npy file or, for any other extension, in a TIFF file.

    Only a TIFF file holds the geo tags. The rows are written with file I/O, which raises an error if
    the disk is full. Writing through a memory map would kill the process instead.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], geo_tags: GeoTags = ()):
        super().__init__(path, shape[0])
        self._shape, self._geo_tags = shape, geo_tags

    def _open(self) -> IO[bytes]:
        if self.path.suffix == ".npy":
            array = np.lib.format.open_memmap(self._unfinished, "w+", np.float16, self._shape)
        else:
            import tifffile  # slow to import, and rarely needed

            array = tifffile.memmap(
                self._unfinished,
                shape=self._shape,
                dtype=np.float16,
                photometric="minisblack",
                planarconfig="contig",
                metadata=None,
                extratags=self._geo_tags,
            )
        file = self._unfinished.open("r+b")
        file.seek(array.offset)
        return file


class GeoTiff(Rows):
    """A GeoTIFF file with rows of classes [n, w]: deflated tiles, the colors, and the geo tags.

    Its nodata value is IGNORE_LABEL. A file that might exceed 4 GiB is a BigTIFF file.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        palette: UInt8[np.ndarray, "classes 3"],
        geo_tags: GeoTags,
    ):
        super().__init__(path, size[0])
        self._size, self._palette, self._geo_tags = size, palette, geo_tags
        self._waiting: list[np.ndarray] = []  # rows that do not fill a row of tiles yet
        self._lengths: list[int] = []  # of the tiles in the file, in bytes

    def _open(self) -> IO[bytes]:
        """Writes a file whose tiles are all empty."""
        import tifffile  # slow to import, and rarely needed

        height, width = self._size
        colors = np.full((256, 3), IGNORED_COLOR, np.uint16)
        colors[: len(self._palette)] = self._palette
        num_tiles = -(-height // TILE) * -(-width // TILE)
        tifffile.imwrite(
            self._unfinished,
            itertools.repeat(b"", num_tiles),
            shape=self._size,
            dtype=np.uint8,
            bigtiff=num_tiles * TILE**2 > 2**32 - 2**26,  # deflating may add some bytes
            tile=(TILE, TILE),
            compression="zlib",
            photometric="palette",
            colormap=257 * colors.T,
            metadata=None,
            software=False,
            extratags=[*self._geo_tags, (GDAL_NODATA, "s", 0, str(IGNORE_LABEL), True)],
        )
        return self._unfinished.open("ab")

    def _encode(self, rows: UInt8[np.ndarray, "n w"]) -> bytes:
        """Returns the rows of tiles that the rows complete."""
        waiting = np.concatenate([*self._waiting, rows])
        num_ready = len(waiting) // TILE * TILE
        self._waiting = [waiting[num_ready:].copy()]
        return b"".join(self._tiles(waiting[top : top + TILE]) for top in range(0, num_ready, TILE))

    def _end(self) -> bytes:
        """Returns the last row of tiles, and writes into the tags where all tiles are."""
        import tifffile

        assert self._file is not None
        start = self._file.tell() - sum(self._lengths)
        (rows,) = self._waiting
        last = self._tiles(rows) if len(rows) else b""
        offsets = start + np.cumsum([0, *self._lengths[:-1]])
        with tifffile.TiffFile(self._unfinished, mode="r+") as tiff:
            tags = tiff.pages.first.tags
            tags["TileOffsets"].overwrite(offsets.tolist())
            tags["TileByteCounts"].overwrite(self._lengths)
        return last

    def _tiles(self, rows: UInt8[np.ndarray, "n w"]) -> bytes:
        """Returns the compressed tiles of a row of tiles, filled up with IGNORE_LABEL."""
        height, width = rows.shape
        margins = (0, TILE - height), (0, -width % TILE)
        padded = np.pad(rows, margins, constant_values=IGNORE_LABEL)
        tiles = [
            zlib.compress(np.ascontiguousarray(padded[:, left : left + TILE]).data, 1)
            for left in range(0, padded.shape[1], TILE)
        ]
        self._lengths += map(len, tiles)
        return b"".join(tiles)


class Together:
    """Publishes all files of one image, or removes all of them.

    Disk errors, such as a full disk, are raised. After any other OSError, or a ValueError because a
    file cannot hold a result, `problem` holds the error message, and nothing more is written for
    this image.
    """

    def __init__(self, files: Mapping[str, Rows]):
        self._files = files
        self.problem: str | None = None

    def write(self, name: str, parts: Iterable[np.ndarray]) -> None:
        """Appends arrays of rows to the file called `name`. Does nothing if `problem` is set."""
        with self._keeping(self._files[name].path):
            for rows in parts if self.problem is None else ():
                self._files[name].write(rows)

    def end(self) -> None:
        """Publishes all files. Removes all files if `problem` is set before or while publishing."""
        for file in self._files.values():
            with self._keeping(file.path):
                if self.problem is None:
                    file.publish()
        if self.problem is not None:
            self.remove()

    def remove(self) -> None:
        """Removes all files."""
        for file in self._files.values():
            file.remove()

    @contextlib.contextmanager
    def _keeping(self, path: Path) -> Generator[None]:
        """Raises disk errors again. Stores any other OSError, or a ValueError, in `problem`."""
        try:
            yield
        except ValueError as error:
            self.problem = f"{path}: {error}"
        except OSError as error:
            named = OSError(error.errno, error.strerror or str(error), str(path))
            if error.errno in _ERRORS_OF_DISK:
                raise named from error
            self.problem = str(named)
