"""Image files that are written a strip of rows at a time, and appear whole or not at all.

Until `publish`, a file has a hidden name of its own. Never uses jax.
"""

import contextlib
import errno
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, UInt8

_FOR_ALL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # of the disk, not of a file


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an error say which file it was: one of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


class Rows:
    """A file that is there after `start`, `write` of all its rows, `finish` and `publish`."""

    def __init__(self, path: Path):
        self.path = path
        self._place = path.with_name(f".{path.name}.tmp")
        self._opened = contextlib.ExitStack()

    def start(self) -> None:
        """Writes what is before the rows."""
        self._file = self._opened.enter_context(self._place.open("wb"))

    def finish(self) -> None:
        """Writes what is behind the rows."""
        self._opened.close()

    def publish(self) -> None:
        """Gives a finished file its name."""
        self._place = self._place.replace(self.path)

    def remove(self) -> None:
        """Leaves nothing behind, however far it came."""
        with contextlib.suppress(OSError):  # what is in its buffer may find the disk full
            self._opened.close()
        with contextlib.suppress(OSError):  # no such file
            self._place.unlink()


class Png(Rows):
    """A picture: palette indices or gray [n, w], or RGB [n, w, 3]. Well-kept libraries write none
    in parts.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        *,
        rgb: bool = False,
        palette: UInt8[np.ndarray, "classes 3"] | None = None,
    ):
        super().__init__(path)
        # By level 1: several times as fast, not much larger.
        self._compressor = zlib.compressobj(1)
        color = 2 if rgb else 0 if palette is None else 3
        self._head = struct.pack(">IIBBBBB", size[1], size[0], 8, color, 0, 0, 0)
        self._palette = palette

    def start(self) -> None:
        super().start()
        self._file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", self._head)
        if self._palette is not None:
            self._chunk(b"PLTE", self._palette.tobytes())

    def write(self, rows: UInt8[np.ndarray, "n w *channels"]) -> None:
        """Appends rows, those of RGB as differences from the pixel on the left (filter 1)."""
        flat = rows.reshape(len(rows), -1)
        filtered = np.pad(flat, ((0, 0), (1, 0)))
        if rows.ndim == 3:
            filtered[:, 0] = 1
            filtered[:, 4:] -= flat[:, :-3]
        self._chunk(b"IDAT", self._compressor.compress(filtered.data))

    def finish(self) -> None:
        self._chunk(b"IDAT", self._compressor.flush())
        self._chunk(b"IEND", b"")
        super().finish()

    def _chunk(self, name: bytes, data: bytes) -> None:
        checksum = zlib.crc32(data, zlib.crc32(name))
        self._file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum))


class Npz(Rows):
    """One array [h, w, k] of float16, for numpy.load(PATH)["probabilities"]."""

    def __init__(self, path: Path, shape: tuple[int, int, int]):
        super().__init__(path)
        self._shape = shape

    def start(self) -> None:
        super().start()
        archive = self._opened.enter_context(zipfile.ZipFile(self._file, "w"))
        # Without a date of its own, which would make every file another one.
        entry = zipfile.ZipInfo("probabilities.npy")
        self._member = self._opened.enter_context(archive.open(entry, "w", force_zip64=True))
        about = {"descr": "<f2", "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(self._member, about)

    def write(self, rows: Float16[np.ndarray, "n w k"]) -> None:
        """Appends rows."""
        self._member.write(np.ascontiguousarray(rows).data)


class Tiff(Rows):
    """One array [h, w, k] of float16, a sample per pixel and class; BigTIFF where it has to be."""

    def __init__(self, path: Path, shape: tuple[int, int, int]):
        super().__init__(path)
        self._shape = shape

    def start(self) -> None:
        super().start()
        import tifffile  # few ask for it

        with tifffile.TiffWriter(self._file, bigtiff=math.prod(self._shape) > 2**30) as writer:
            # Nothing is written in the place of the pixels yet.
            place = writer.write(
                shape=self._shape,
                dtype=np.float16,
                photometric="minisblack",
                planarconfig="contig",
                metadata=None,
                returnoffset=True,
            )
        assert place is not None  # returnoffset
        self._file.seek(place[0])

    def write(self, rows: Float16[np.ndarray, "n w k"]) -> None:
        """Appends rows."""
        self._file.write(np.ascontiguousarray(rows).data)


class Together:
    """Files of which all appear, or none.

    A full disk would end every other file alike: that is raised. Other problems are these files' own:
    the first one is kept, and nothing more is done.
    """

    def __init__(self, files: Sequence[Rows]):
        self._files = files
        self.problem: str | None = None

    def attempt(self, file: Rows, call: Callable, *args: Any) -> None:
        """Calls call(*args), which works on one of the files, unless there was a problem before."""
        if self.problem is not None:
            return
        try:
            with naming(file.path):
                call(*args)
        except OSError as problem:
            if problem.errno in _FOR_ALL:
                raise
            self.problem = str(problem)

    def end(self) -> None:
        """Publishes the files, which are finished; after a problem, removes them."""
        for file in self._files:
            self.attempt(file, file.publish)
        if self.problem is not None:
            self.remove()

    def remove(self) -> None:
        """Leaves nothing behind."""
        for file in self._files:
            file.remove()
