"""Atomic file writes: after a crash, a file has its old or its new contents, never a mixture.

Paths may be in a bucket; see `buckets`. Never uses jax.
"""

import contextlib
import fcntl
import io
import json
import logging
import math
import os
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath

import dense_jax
from dense_jax import buckets

_LOG = logging.getLogger("dense_jax")


@contextlib.contextmanager
def atomic(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Opens a file for writing. The file gets its name only when it is complete and on disk.

    If an error occurs, an existing file is left unchanged, and no temporary file is left behind.
    """
    path = epath.Path(path)
    if buckets.is_url(path):
        content = io.BytesIO()
        yield content
        buckets.write(path, content.getbuffer())
        return
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
    os.fsync(file.fileno())


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a text file atomically."""
    with atomic(path) as file:
        file.write(text.encode())


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(to_json(value), indent=2) + "\n")


def check_format(path: epath.PathLike, content: Mapping[str, Any], newest: int) -> None:
    """Raises ValueError unless this package reads the format of a file.

    content: What the file says. Without a `format_version`, the version is 1.
    newest: The newest version that this package reads.
    """
    version = content.get("format_version", 1)
    if type(version) is not int or not 1 <= version <= newest:
        raise ValueError(
            f"{path} has version {version!r} of its format, and dense_jax {dense_jax.__version__} "
            f"reads up to {newest}: use the dense_jax that wrote it, or a newer one"
        )


def to_json(value: Any) -> Any:
    """Converts a value to plain JSON values. NaN (an undefined score) becomes null."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [to_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns an absolute path, without "..", or the path of a run in a bucket.

    Raises ValueError if the bucket cannot be read.
    """
    if not buckets.is_url(path):
        return epath.Path(path).resolve()
    buckets.check(os.fspath(path), "run")
    return epath.Path(path)


def local_copy(folder: str, within: str = "") -> str:
    """Copies a folder in a bucket to the user's cache folder, and returns the copy's path.

    Downloads only new and changed files, and deletes the copies of files that are gone. Any other
    path is returned unchanged.

    within: The subfolder to copy; by default, all.

    Raises ValueError if there is nothing to copy.
    """
    if not buckets.is_url(folder):
        return folder
    buckets.check(folder, "data")
    root = _copy_of(folder)
    source = os.path.join(folder, within)
    if not _copy(source, root / within):
        raise ValueError(f"there is nothing in {source}")
    return str(root)


def _copy_of(url: str) -> Path:
    return cache_folder() / "buckets" / url.removeprefix("gs://").rstrip("/")


def _copy(url: str, copy: Path, skipped: Collection[str] = ()) -> int:
    """Makes `copy` a copy of a folder in a bucket. Returns the number of its files."""
    objects = buckets.list_objects(url, skipped)
    for file in [file for file in copy.rglob("*") if file.is_file()]:
        if file.relative_to(copy).as_posix() not in objects and file.suffix != ".tmp":
            file.unlink(missing_ok=True)  # those of other processes that are not complete stay
    copy.mkdir(parents=True, exist_ok=True)
    buckets.download(url, objects, copy)
    return len(objects)


def local_files(url: str, endings: Collection[str]) -> list[Path]:
    """Copies files in a bucket to the user's cache folder, and returns the paths of the copies.

    url: An object, a glob, or a folder, which stands for the files directly in it that have one of
      the extensions `endings`.
    """
    buckets.check(url, "data")
    bucket = "/".join(url.split("/")[:3])
    objects = buckets.find(url, endings)
    buckets.download(bucket, objects, _copy_of(bucket))
    return [_copy_of(bucket) / path for path in objects]


@contextlib.contextmanager
def working_copy(folder: str, skipped: Collection[str] = ()) -> Iterator[Path]:
    """Opens a folder for programs that need local files.

    Files that are written to the local copy of a folder in a bucket are copied there at the end,
    also after an error.

    skipped: Names of subfolders to leave out.
    """
    if not buckets.is_url(folder):
        yield Path(folder)
        return
    buckets.check(folder, "output")
    copy = _copy_of(folder)
    _copy(folder, copy, skipped)
    outbox = buckets.Outbox(copy, folder)
    try:
        yield copy
    finally:
        outbox.send()


@contextlib.contextmanager
def appending(path: epath.Path) -> Iterator[IO[bytes]]:
    """Opens a local file to append to. Its copy in a bucket, if any, is written at the end."""
    if not buckets.is_url(path):
        with path.open("ab") as file:
            yield file
        return
    with tempfile.NamedTemporaryFile("ab") as file:
        file.write(path.read_bytes() if path.exists() else b"")
        file.flush()
        try:
            yield file
        finally:
            file.flush()
            buckets.write(path, Path(file.name).read_bytes())


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
