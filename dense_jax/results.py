"""Image files that are written a strip of rows at a time, and appear whole or not at all.

Until `close`, a file has a hidden name of its own; `abandon` removes it. Never uses jax.
"""

import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float16, UInt8


class Rows:
    """A file that is there after `close`."""

    def __init__(self, path: Path):
        self._path = path
        self._unfinished = path.with_name(f".{path.name}.tmp")
        self._file = self._unfinished.open("wb")

    def close(self) -> None:
        """Nothing is to follow."""
        self._file.close()
        self._unfinished.replace(self._path)

    def abandon(self) -> None:
        """Leaves nothing behind, if not closed before."""
        self._file.close()
        self._unfinished.unlink(missing_ok=True)

    @property
    def closed(self) -> bool:
        """Whether it is at its end."""
        return self._file.closed


class Png(Rows):
    """A picture: palette indices or grey [n, w], or RGB [n, w, 3]. Well-kept libraries write none
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
        colour = 2 if rgb else 0 if palette is None else 3
        self._file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], 8, colour, 0, 0, 0))
        if palette is not None:
            self._chunk(b"PLTE", palette.tobytes())

    def write(self, rows: UInt8[np.ndarray, "n w *channels"]) -> None:
        """Appends rows, those of RGB as differences from the pixel on the left (filter 1)."""
        flat = rows.reshape(len(rows), -1)
        filtered = np.pad(flat, ((0, 0), (1, 0)))
        if rows.ndim == 3:
            filtered[:, 0] = 1
            filtered[:, 4:] -= flat[:, :-3]
        self._chunk(b"IDAT", self._compressor.compress(filtered.data))

    def close(self) -> None:
        self._chunk(b"IDAT", self._compressor.flush())
        self._chunk(b"IEND", b"")
        super().close()

    def _chunk(self, name: bytes, data: bytes) -> None:
        checksum = zlib.crc32(data, zlib.crc32(name))
        self._file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum))


class Npz(Rows):
    """One array [h, w, k] of float16, for numpy.load(PATH)["probabilities"]."""

    def __init__(self, path: Path, shape: tuple[int, int, int]):
        super().__init__(path)
        self._archive = zipfile.ZipFile(self._file, "w")
        # Without a date of its own, which would make every file another one.
        entry = zipfile.ZipInfo("probabilities.npy")
        self._member = self._archive.open(entry, "w", force_zip64=True)
        about = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._member, about)

    def write(self, rows: Float16[np.ndarray, "n w k"]) -> None:
        """Appends rows."""
        self._member.write(np.ascontiguousarray(rows).data)

    def close(self) -> None:
        self._end()
        super().close()

    def abandon(self) -> None:
        if not self.closed:
            self._end()
        super().abandon()

    def _end(self) -> None:
        self._member.close()
        self._archive.close()


class Tiff(Rows):
    """One array [h, w, k] of float16, a sample per pixel and class; BigTIFF where it has to be."""

    def __init__(self, path: Path, shape: tuple[int, int, int]):
        super().__init__(path)
        import tifffile  # few ask for it

        with tifffile.TiffWriter(self._file, bigtiff=math.prod(shape) > 2**30) as writer:
            # Nothing is written in the place of the pixels yet.
            place = writer.write(
                shape=shape,
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
