"""Image files that are written a strip of rows at a time, and appear whole or not at all.

Until `publish`, a file has a hidden name. `Together` publishes all files of an image, or none: that
takes more than `storage.atomic`, which publishes one file when it is closed. Never uses jax.
"""

import contextlib
import errno
import struct
import zlib
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import UInt8

# Errors of the disk, which would meet every other file as well.
_ERRORS_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class Rows:
    """A file of `height` rows: `write` them all, from the top down, then `publish` or `remove`."""

    def __init__(self, path: Path, height: int):
        self.path = path
        self._rows_left = height
        self._unfinished = path.with_name(f".{path.name}.tmp")
        self._file: IO[bytes] | None = None

    def write(self, rows: np.ndarray) -> None:
        """Appends rows. The first ones open the file, and the last ones close it."""
        if self._file is None:
            self._file = self._open()
        self._file.write(self._encode(rows))
        self._rows_left -= len(rows)
        if self._rows_left == 0:
            self._file.write(self._end())
            self._file.close()

    def _open(self) -> IO[bytes]:
        """Opens the unfinished file and writes what precedes the rows."""
        raise NotImplementedError

    def _encode(self, rows: np.ndarray) -> bytes | memoryview:
        """Returns rows as they stand in the file."""
        return np.ascontiguousarray(rows).data

    def _end(self) -> bytes:
        """Returns what follows the rows."""
        return b""

    def publish(self) -> None:
        """Gives a complete file its name."""
        self._unfinished = self._unfinished.replace(self.path)

    def remove(self) -> None:
        """Removes the file, whether it is unfinished or published."""
        with contextlib.suppress(OSError):  # the rest of its buffer may not fit on the disk
            if self._file is not None:
                self._file.close()
        with contextlib.suppress(OSError):  # there may be no such file
            self._unfinished.unlink()


class Png(Rows):
    """A picture: palette indices or gray [n, w], or RGB [n, w, 3].

    Written here because no library can be pushed rows from Python: libvips cannot (libvips#2859), and
    pypng pulls them.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        *,
        rgb: bool = False,
        palette: UInt8[np.ndarray, "classes 3"] | None = None,
    ):
        super().__init__(path, size[0])
        self._compressor = zlib.compressobj(1)  # level 1: several times as fast, not much larger
        color = 2 if rgb else 0 if palette is None else 3
        header = struct.pack(">IIBBBBB", size[1], size[0], 8, color, 0, 0, 0)
        self._start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)
        if palette is not None:
            self._start += _chunk(b"PLTE", palette.tobytes())

    def _open(self) -> IO[bytes]:
        file = self._unfinished.open("wb")
        file.write(self._start)
        return file

    def _encode(self, rows: UInt8[np.ndarray, "n w *channels"]) -> bytes:
        """Returns compressed rows; those of RGB hold differences from the pixel on the left."""
        flat = rows.reshape(len(rows), -1)
        filtered = np.pad(flat, ((0, 0), (1, 0)))
        if rows.ndim == 3:
            filtered[:, 0] = 1  # the filter's number
            filtered[:, 4:] -= flat[:, :-3]
        return _chunk(b"IDAT", self._compressor.compress(filtered.data))

    def _end(self) -> bytes:
        return _chunk(b"IDAT", self._compressor.flush()) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(name))
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


class Array(Rows):
    """One array [h, w, k] of float16: a .npy file, or a TIFF file for any other ending.

    The libraries lay the file out. Rows are then written to the file and not to mapped memory: a full
    disk is an error where a file is written, and kills the process where memory is.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]):
        super().__init__(path, shape[0])
        self._shape = shape

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
            )
        file = self._unfinished.open("r+b")
        file.seek(array.offset)
        return file


class Together:
    """The files of one image by name, of which all appear or none.

    An error of the disk is raised. Any other error is the problem of these files alone: the first one
    is kept in `problem`, and nothing more is written.
    """

    def __init__(self, files: Mapping[str, Rows]):
        self._files = files
        self.problem: str | None = None

    def write(self, name: str, parts: Iterable[np.ndarray]) -> None:
        """Appends parts of rows to a file, unless there was a problem."""
        with self._keeping(self._files[name].path):
            for rows in parts if self.problem is None else ():
                self._files[name].write(rows)

    def end(self) -> None:
        """Publishes the files, which are complete; removes them if there was a problem."""
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
        """Keeps an error as the problem, or raises it; either way, it names the file."""
        try:
            yield
        except OSError as error:
            named = OSError(error.errno, error.strerror or str(error), str(path))
            if error.errno in _ERRORS_OF_DISK:
                raise named from error
            self.problem = str(named)
