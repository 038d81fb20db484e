"""Keeps decoded examples in the memory of this host."""

import math
import os
import pathlib
import tempfile
import threading
import weakref
from typing import Any

import numpy as np
from jaxtyping import Int32

from dense_jax.data import verify
from dense_jax.data.source import Examples


class Cached(Examples):
    """A copy of a source, decoded once into memory that worker processes share. Labels are uint8.

    Raises ValueError if there is not enough memory or if any example is invalid.
    """

    def __init__(self, source: Examples):
        extra = sum(
            np.dtype(field.dtype).itemsize * math.prod(field.shape) for field in source.fields
        )
        num_pixels = source.sizes.prod(axis=1, dtype=np.int64).sum()
        channel = np.dtype(source.dtype).itemsize
        needed = int(num_pixels * (source.num_channels * channel + 1 + extra))
        check_memory(needed, free_memory(), f"{len(source)} examples")
        # An anonymous file (memfd) has no size limit, whereas many containers limit /dev/shm to
        # 64 MB. Unlike a temporary file, a memfd is freed even if all processes that use it are
        # killed. Unpickled copies open the memfd through /proc. macOS has only temporary files.
        if hasattr(os, "memfd_create"):
            file = os.fdopen(os.memfd_create("dense_jax"), "wb")
            path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        else:
            file = tempfile.NamedTemporaryFile(prefix="dense_jax")  # noqa: SIM115
            path = file.name
        weakref.finalize(self, file.close)
        lock = threading.Lock()

        def keep(i: int) -> dict[str, Any]:
            example = source[i]
            example = dict(example, label=example["label"].astype(np.uint8))
            with lock:
                return {name: _append(value, file) for name, value in example.items()}

        entries, errors = verify.visit(keep, len(source), "reading and keeping")
        verify.refuse(errors, len(source))
        file.flush()
        self.num_channels, self.dtype = source.num_channels, source.dtype
        self.fields, self.has_levels = source.fields, source.has_levels
        self._path, self._entries, self._sizes = path, entries, source.sizes
        self._map()

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_memory"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._map()

    def _map(self):
        self._memory = np.memmap(self._path, np.uint8, "r")

    @property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        return self._sizes

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Returns an example. The arrays are read-only views of the shared memory."""
        return {
            name: np.ndarray(buffer=self._memory, **entry) if isinstance(entry, dict) else entry
            for name, entry in self._entries[i].items()
        }


def _append(value: Any, file) -> Any:
    """Appends an array to `file` and returns its location. Returns a non-array value unchanged."""
    if not isinstance(value, np.ndarray):
        return value
    place = {"shape": value.shape, "dtype": value.dtype, "offset": file.tell()}
    file.write(np.ascontiguousarray(value))
    return place


def free_memory() -> float:
    """Returns the available memory of this host in bytes, including reclaimable memory.

    Where the system does not say how much is available (macOS), returns all memory.
    """
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def check_memory(needed: int, free: float, what: str) -> None:
    """Raises ValueError if `needed` > `free`, both in bytes. `what` describes the data."""
    if needed > free:
        raise ValueError(
            f"data.cache needs {needed / 1e9:.2f} GB of memory for {what}, but only "
            f"{free / 1e9:.2f} GB are free"
        )
