"""Files in Google Cloud Storage: checks of access, whole objects, local copies, and locks.

A path in a bucket is written gs://BUCKET/FOLDER, and etils.epath reads and lists it through gcsfs.
An object appears whole or not at all. It cannot be appended to, and a folder cannot be renamed at
once. Base module: any other module may import it. Never uses jax.
"""

import contextlib
import functools
import json
import logging
import os
import pathlib
import queue
import re
import socket
import threading
import time
import uuid
from collections.abc import Collection, Mapping
from typing import Any, Literal

from etils import epath
from etils.epath import backend

PATIENCE = 10  # seconds until a bucket must have answered
REFRESH = 15  # seconds between two refreshes of a lock
STALE = 60  # seconds without a refresh, after which a lock is free

# Why a path is given: to read data, to read a run, or to write.
Access = Literal["data", "run", "output"]

_LOG = logging.getLogger("dense_jax")
os.environ.setdefault("EPATH_USE_TF", "false")  # else epath imports TensorFlow, if installed
# Else gcsfs asks by gRPC of which kind each bucket is. Only zonal buckets need that.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def is_url(path: epath.PathLike) -> bool:
    """Returns whether a path is a URL, such as gs://BUCKET/FOLDER, but not one that `hub` finds."""
    return "://" in (text := os.fspath(path)) and not text.startswith("hf://")


@functools.cache
def file_system() -> Any:
    """Returns the gcsfs file system that epath uses. Without credentials, it is anonymous."""
    import aiohttp
    import fsspec
    import google.auth

    for name in ("fsspec", "gcsfs", "google.auth"):  # they log what an error then says
        logging.getLogger(name).setLevel(logging.CRITICAL)
    token = "anon"
    if "STORAGE_EMULATOR_HOST" not in os.environ:
        with contextlib.suppress(google.auth.exceptions.DefaultCredentialsError):
            google.auth.default()
            token = "google_default"
    fsspec.config.conf["gcs"] = {
        "token": token,
        # Other processes, and TensorStore, write to the listed folders.
        "use_listings_cache": False,
        # By default, a request waits forever for a lost answer. gcsfs repeats those that time out.
        "requests_timeout": aiohttp.ClientTimeout(None, sock_connect=30, sock_read=60),
    }
    return backend.fsspec_backend.fs("gs://")


@functools.cache
def check(url: str, access: Access) -> None:
    """Raises ValueError, within 15 seconds, if a path in a bucket cannot be used for `access`."""
    match = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]+[a-z0-9])(/.*)?", url)
    if not match:
        raise ValueError(f"{url} is neither a folder nor gs://BUCKET/FOLDER (Google Cloud Storage)")
    bucket, key = match[1], (match[2] or "").strip("/")
    if access == "output" and not key:
        raise ValueError(f"{url} is a whole bucket: name a folder in it, such as gs://{bucket}/run")
    try:
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{url}: a path in a bucket needs gcsfs: pip install 'gcsfs>=2026.10.1'"
        ) from error
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:  # gcsfs, google-auth and aiohttp raise many types
            answers.put(_ask(bucket, key, access))
        except Exception as error:  # noqa: BLE001
            answers.put(error)

    # In a thread, because neither the search for credentials nor retries can be interrupted.
    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answers.get(timeout=PATIENCE)
    except queue.Empty:
        error = TimeoutError()
    if error:
        raise ValueError(_advice(error, bucket)) from error


def _ask(bucket: str, key: str, access: Access) -> None:
    """Uses a bucket as `access` says, and raises the error of the first use that fails."""
    files, is_emulated = file_system(), "STORAGE_EMULATOR_HOST" in os.environ
    if files.credentials.credentials is None and access != "data" and not is_emulated:
        raise PermissionError  # without asking; data may be public
    if access != "data":
        files.call("GET", "b/{}", bucket)  # Orbax reads the bucket's metadata
    files.call("GET", "b/{}/o", bucket, prefix=key, maxResults=1)
    if access == "output":
        probe = f"{bucket}/{key}/.writable-{uuid.uuid4().hex[:12]}"
        files.pipe_file(probe, b"")
        files.rm_file(probe)


def _advice(error: Exception, bucket: str) -> str:
    """Returns the line that says what is wrong with a bucket and what to do."""
    login = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
    code = getattr(error, "code", None)
    match error:
        case TimeoutError():
            return (
                f"gs://{bucket} does not answer within {PATIENCE} s. If it needs a login, {login}"
            )
        case FileNotFoundError():
            return f"there is no bucket gs://{bucket}"
        case PermissionError():
            return f"there are no credentials for gs://{bucket}: {login}"
        case _ if code in (401, "401"):
            return f"the credentials for gs://{bucket} are missing or not valid: {login}"
        case OSError() if "Forbidden" in str(error):
            reason = str(error).partition("\n")[2].strip() or "forbidden"
            return (
                f"no permission for gs://{bucket} ({reason}): the account needs the roles "
                "storage.objectUser and storage.legacyBucketReader there"
            )
    what = " ".join(str(error).split()) or type(error).__name__
    return f"gs://{bucket} cannot be used: {what}"


def write(path: epath.PathLike, content: bytes | memoryview) -> None:
    """Writes an object, which appears whole or not at all."""
    file_system().pipe_file(os.fspath(path), content)


def move(source: epath.Path, target: epath.Path) -> None:
    """Renames a folder. In a bucket, copies and deletes its objects one by one."""
    if is_url(source):
        file_system().mv(str(source), str(target), recursive=True)
    else:
        source.replace(target)


def list_objects(url: str, skipped: Collection[str] = ()) -> dict[str, Mapping[str, Any]]:
    """Returns {path in the folder: metadata} for all objects below a folder.

    skipped: Names of folders whose objects are left out.
    """
    root = url.removeprefix("gs://").rstrip("/")
    found = file_system().find(root, detail=True)
    paths = {name.removeprefix(f"{root}/"): about for name, about in found.items()}
    return {
        path: about
        for path, about in paths.items()
        if not path.endswith("/") and not {"..", *skipped} & set(path.split("/"))
    }


def find(url: str, endings: Collection[str]) -> dict[str, Mapping[str, Any]]:
    """Returns {path in the bucket: metadata} of the objects that a URL names.

    url: An object, a glob, or a folder, which stands for the objects directly in it that have one
      of the extensions `endings`.
    """
    found = file_system().glob(url, detail=True)
    if [about["type"] for about in found.values()] == ["directory"]:
        found = {
            name: about
            for name, about in file_system().find(url, maxdepth=1, detail=True).items()
            if (path := pathlib.PurePosixPath(name)).suffix.lower() in endings
            and not path.name.startswith(".")
        }
    return {
        name.partition("/")[2]: about for name, about in found.items() if about["type"] == "file"
    }


def download(url: str, objects: Mapping[str, Mapping[str, Any]], folder: pathlib.Path) -> None:
    """Copies objects to a local folder, but for those of which the copy is as new.

    objects: As returned by `list_objects`. A copy has the size and the time of its object.
    """
    unfinished: dict[str, pathlib.Path] = {}
    for path, about in objects.items():
        copy = folder / path
        if not copy.exists() or _version(copy) != (about["size"], _nanoseconds(about)):
            copy.parent.mkdir(parents=True, exist_ok=True)
            unfinished[path] = copy.with_name(f".{uuid.uuid4().hex}.tmp")
    root = url.removeprefix("gs://").rstrip("/")
    try:
        names = [f"{root}/{path}" for path in unfinished]
        if names:
            file_system().get(names, [str(path) for path in unfinished.values()])
        for path, file in unfinished.items():
            os.utime(file, ns=(0, _nanoseconds(objects[path])))
            file.replace(folder / path)
    finally:
        for file in unfinished.values():
            file.unlink(missing_ok=True)


def _version(file: pathlib.Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _nanoseconds(about: Mapping[str, Any]) -> int:
    return round(about["mtime"].timestamp() * 1e6) * 1000


class Outbox:
    """A local folder whose files are copied to a folder in a bucket by each call of `send`.

    The files that are in the local folder at the start are not copied until they change.
    """

    def __init__(self, folder: pathlib.Path, url: str):
        self.folder, self._url = folder, url.rstrip("/")
        self._sent = self._versions()

    def _versions(self) -> dict[pathlib.Path, tuple[int, int]]:
        return {file: _version(file) for file in self.folder.rglob("*") if file.is_file()}

    def send(self) -> None:
        """Copies the files that are new or have changed since the last call."""
        for file, version in sorted(self._versions().items()):
            if self._sent.get(file) != version:
                name = file.relative_to(self.folder).as_posix()
                file_system().put_file(str(file), f"{self._url}/{name}")
                self._sent[file] = version


class Lock:
    """A lock that is an object in a bucket: who holds it, refreshed every REFRESH seconds.

    The object is created only if it is absent, and replaced only if nobody else has replaced it.
    The lock of a process that was killed is taken over at once on the same host (a pod keeps its
    host name when it is restarted), and elsewhere after STALE seconds without a refresh.
    """

    def __init__(self, path: epath.Path):
        """Takes the lock. Raises ValueError if another process holds it."""
        bucket, _, self._key = str(path).removeprefix("gs://").partition("/")
        self._bucket, self._path = bucket, path
        self._id = uuid.uuid4().hex
        self._is_lost = False
        self._generation = self._take()
        self._released = threading.Event()
        self._refresher = threading.Thread(target=self._keep, daemon=True)
        self._refresher.start()

    def _take(self) -> str:
        """Writes the object, and returns its generation. Generation 0 is that of an absent object."""
        replaced = "0"
        while not (generation := self._write(replaced)):
            holder, replaced = self._read()
            is_here = holder.get("host") == socket.gethostname()
            is_dead = is_here and _start_of(holder["process"]) != holder["started"]
            if replaced != "0" and not is_dead:
                self._wait(holder.get("holder", "another process"), replaced)
        return generation

    def _wait(self, holder: str, generation: str) -> None:
        """Waits until the lock is stale or gone. Raises ValueError if its holder refreshes it."""
        run = self._path.parent.parent
        _LOG.info("%s is locked by %s: waiting %d s for a sign of life", run, holder, STALE)
        end = time.monotonic() + STALE
        while time.monotonic() < end:
            time.sleep(STALE / 60)
            _, now = self._read()
            if now == "0":
                return
            if now != generation:
                raise ValueError(f"{run} is in use by {holder}")

    def _write(self, generation: str) -> str:
        """Writes the object if it has a generation. Returns its new generation, or ""."""
        holder = {
            "holder": f"process {os.getpid()} on {socket.gethostname()}",
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": _start_of(os.getpid()),
            "id": self._id,
        }
        files = file_system()
        try:
            written = files.call(
                "POST",
                files.base.replace("/storage/", "/upload/storage/") + "b/{}/o",
                self._bucket,
                uploadType="media",
                name=self._key,
                ifGenerationMatch=generation,
                data=json.dumps(holder).encode(),
                json_out=True,
            )
        except FileExistsError:  # of another generation
            holder, generation = self._read()
            # A request that was repeated, because its answer was lost, finds its own object.
            return generation if holder.get("id") == self._id else ""
        return written["generation"]

    def _read(self) -> tuple[dict[str, Any], str]:
        """Returns the holder of the lock and the object's generation: {} and "0" if absent."""
        files = file_system()
        try:
            about = files.call("GET", "b/{}/o/{}", self._bucket, self._key, json_out=True)
            holder = json.loads(files.cat_file(str(self._path)))
        except FileNotFoundError:
            return {}, "0"
        return holder, about["generation"]

    def _keep(self) -> None:
        """Refreshes the lock until it is released or lost."""
        while not self._released.wait(REFRESH) and not self._is_lost:
            try:  # again after an error, as long as nobody else takes the lock
                self._refresh()
            except Exception as error:  # noqa: BLE001
                _LOG.warning("%s could not be refreshed: %s", self._path, error)

    def _refresh(self) -> None:
        self._generation = self._write(self._generation)
        self._is_lost = not self._generation

    def check(self) -> None:
        """Raises OSError if another process has taken the lock."""
        if self._is_lost:
            raise OSError(
                f"{self._path.parent.parent} was taken over by {self._read()[0].get('holder')}, "
                f"because this process did not refresh its lock for {STALE} s"
            )

    def release(self) -> None:
        """Removes the object."""
        self._released.set()
        self._refresher.join()
        if not self._is_lost:
            try:
                file_system().call(
                    *("DELETE", "b/{}/o/{}", self._bucket, self._key),
                    ifGenerationMatch=self._generation,
                )
            except (FileNotFoundError, FileExistsError):  # removed by hand, or taken over
                pass


def _start_of(process: int) -> str:
    """Returns when a process of this host started, in clock ticks, or "" if there is none."""
    try:
        # The process name, in parentheses, may contain anything. The 22nd field is the start.
        status = pathlib.Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    fields = status.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]
