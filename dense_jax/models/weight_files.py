"""Finds files of weights on this computer, on the Hugging Face hub and elsewhere, and reads them."""

import hashlib
import importlib.util
import shutil
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dense_jax import hub, storage
from dense_jax.models import torch_files

# The exceptions that readers raise for a damaged file or a file in another format.
UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, RuntimeError, EOFError, AttributeError),
    *(SafetensorError, zipfile.BadZipFile, UnpicklingError),
)


def find(source: str, option: str) -> Path:
    """Returns the local path of a file, and downloads the file if necessary.

    source: A path, hf://OWNER/NAME/FILE on the Hugging Face hub, hf://OWNER/NAME for the workdir
      that a repository there is, package://MODULE/FILE in an installed Python package, or an
      https:// address.
    option: The option that names the source, for messages.

    Raises ValueError if the file is missing or cannot be downloaded. The message says where to get
    the file.
    """
    scheme, _, rest = source.rpartition("://")
    if scheme and scheme not in FINDERS:
        raise ValueError(
            f"{option}={source!r} must be a path or begin with one of "
            f"{', '.join(f'{scheme}://' for scheme in FINDERS)}"
        )
    try:
        path = FINDERS[scheme](rest) if scheme else Path(source)
    except (OSError, ValueError) as error:  # the base classes of huggingface_hub's errors
        raise ValueError(
            f"{option}={source!r}: {error}. Or bring the file from elsewhere, and pass "
            f"--config.{option}=PATH"
        ) from error
    if not path.exists():
        raise ValueError(f"{option}={source!r}: there is no such file")
    return path


def is_at_hand(source: str) -> bool:
    """Returns whether a file is on this computer, so that `find` downloads nothing."""
    scheme, _, rest = source.rpartition("://")
    if scheme == "hf":
        import huggingface_hub  # slow to import, and few runs need it

        owner, name, file = rest.split("/", 2)
        return isinstance(huggingface_hub.try_to_load_from_cache(f"{owner}/{name}", file), str)
    if scheme == "https":
        return _of_web(rest).exists()
    try:
        return _in_package(rest).exists()
    except ValueError:
        return False


def _in_package(rest: str) -> Path:
    module, _, file = rest.partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package is not installed: pip install {module.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0], file)


def _on_web(rest: str) -> Path:
    path = _of_web(rest)
    if not path.exists():
        try:
            with urllib.request.urlopen(f"https://{rest}") as reply, storage.atomic(path) as file:
                shutil.copyfileobj(reply, file)
        except OSError as error:
            raise ValueError(
                f"it cannot be downloaded: {error}. Copy the file to {path}"
            ) from error
    return path


def _of_web(rest: str) -> Path:
    """Returns the path where a file from the web is kept."""
    return storage.cache_folder() / "weights" / rest.rpartition("/")[2]


def sha256(path: Path) -> str:
    """Returns the SHA-256 hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns {name: tensor} from a file. Raises ValueError if the file cannot be read."""
    if path.suffix not in READERS:
        raise ValueError(f"{path} must end in one of {', '.join(READERS)}")
    try:
        return READERS[path.suffix](str(path))
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_npz(path: str) -> dict[str, np.ndarray]:
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


FINDERS: dict[str, Callable[[str], Path]] = {
    "hf": hub.download,
    "package": _in_package,
    "https": _on_web,
}
READERS: dict[str, Callable[[str], dict[str, np.ndarray]]] = {
    ".safetensors": load_file,
    ".npz": _read_npz,
    ".pth": torch_files.read,
    ".pt": torch_files.read,
    ".bin": torch_files.read,
}
