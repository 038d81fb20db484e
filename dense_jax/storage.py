"""Atomic file writes: after a crash, a file has its old or its new contents, never a mixture.

Base module: any other module may import it. Never uses jax.
"""

import contextlib
import fcntl
import io
import json
import logging
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath

_LOG = logging.getLogger("dense_jax")


@contextlib.contextmanager
def atomic(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Opens a file for writing. The file gets its name only when it is complete and on disk.

    If an error occurs, an existing file is left unchanged, and no temporary file is left behind.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The temporary name is unique, because other processes may write the file at the same time.
    unfinished = path.parent / f".{path.name[:200]}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        with unfinished.open("wb") as file:
            yield file
            sync(file)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def sync(file: IO) -> None:
    """Waits until everything written to an open file is on disk."""
    file.flush()
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # a file in a bucket
        os.fsync(file.fileno())


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a text file atomically."""
    with atomic(path) as file:
        file.write(text.encode())


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(to_json(value), indent=2) + "\n")


def to_json(value: Any) -> Any:
    """Converts a value to plain JSON values. NaN (an undefined score) becomes null."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [to_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value


def try_lock(file: IO | int, path: epath.PathLike) -> bool:
    """Locks an open file until it is closed. Returns False if another process holds the lock.

    If the file system does not support locks, warns and returns True.

    file: The open file or its descriptor. path: The path of the file, for the warning.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _LOG.warning("%s cannot be locked (%s): do not start a second run there", path, error)
    return True


def cache_folder() -> Path:
    """Returns the user's cache folder, for results that can be recomputed."""
    # If the user has no home folder, the returned folder cannot be created (OSError).
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.devnull if cache.startswith("~") else cache) / "dense_jax"
