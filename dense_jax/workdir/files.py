"""The small files of a run: its config, dataset, environment and results.

config.json       the whole config, as nested objects
experiment.py     a copy of the experiment file, as it was when the run began
dataset.json      class names, palette, number of channels and ladder of tile sizes, enough to
                  predict without the data; fingerprints, which detect changed data
environment.json  version of the workdir's format; versions of packages, git commit (with "+" if
                  files had changed), devices and command of the run's latest start; the origin and
                  the license of the weights that the run began with
metrics.jsonl     one object per line: the step, and values by metric name
cost.json         FLOPs, memory, speed and the share of evaluations in the time of the training,
                  written when the run finishes
result.json       final and best scores, and those of baselines, written when the run finishes
tuning.json       in sweeps that tune learning rates: the rates that were tried, and their scores

learning_curve.png and worst.png are drawn when the run finishes: losses and mean IoU by step, and the
worst images of the last evaluation. The workdir also holds checkpoints, TensorBoard event files and
pictures. During training, the file checkpoints/lock is locked against other processes. Only the
function `environment` imports jax.
"""

import importlib.metadata
import json
import logging
import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

import dense_jax
from dense_jax import buckets, regions, storage

# Fields that may change between two starts of a run, because they do not affect its results.
OPERATIONAL = (
    *("checkpoint_every", "log_every", "eval.batch_size", "eval.num_pictures"),
    *("data.workers", "data.cache", "data.verify", "num_seeds"),
)

VERSION = 1  # of a workdir's format, increased if older readers cannot read new workdirs
TUNING = "tuning.json"
TRIALS = "tuning"  # the folder with the trials of a sweep's learning rates, beside the runs
NOT_FINITE = "is not finite"  # part of the error of a run that diverged

_LOG = logging.getLogger("dense_jax")
# By workdir, the descriptors of the open lock files, or the locks in buckets.
_LOCKS: dict[epath.Path, int | buckets.Lock] = {}


def check_path(directory: epath.PathLike) -> epath.Path:
    """Returns the absolute path of a workdir.

    Raises ValueError if the path is in a bucket that cannot be written to, or contains [...], ** or
    a backslash. Orbax reads a path as a glob pattern, and TensorStore reads a backslash as a slash,
    so checkpoints would be lost.
    """
    path = storage.absolute(directory)
    if match := re.search(r"\[[^/]+\]|\*\*|\\", str(path)):
        raise ValueError(
            f"--workdir={path} contains {match.group()!r}: checkpoints cannot be saved in a path with "
            r"[...], ** or \ in it. Use another --workdir"
        )
    if buckets.is_url(path):
        buckets.check(str(path), "output")
    return path


def absolute(root: str) -> str:
    """Returns a folder's absolute path. An empty path or a URL stays unchanged."""
    return os.path.abspath(os.path.expanduser(root)) if root and "://" not in root else root


def lock(path: epath.Path) -> None:
    """Keeps other processes from training in a workdir, until `unlock` or the end of this process.

    Raises ValueError if another process is already training in the workdir.
    """
    if path in _LOCKS:
        return
    holder = path / "checkpoints" / "lock"
    if buckets.is_url(path):
        _LOCKS[path] = buckets.Lock(holder)
        return
    holder.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(holder, os.O_RDWR | os.O_CREAT, 0o666)
    if not storage.try_lock(file, holder):
        os.close(file)
        raise ValueError(f"{path} is in use by {holder.read_text() or 'another process'}")
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _LOCKS[path] = file


def unlock(path: epath.Path) -> None:
    """Releases the lock on a workdir."""
    match _LOCKS.pop(path, None):
        case int(descriptor):
            os.close(descriptor)
        case buckets.Lock() as held:
            held.release()


def check_lock(path: epath.Path) -> None:
    """Raises OSError if another process has taken over the lock on a workdir in a bucket."""
    if isinstance(held := _LOCKS.get(path), buckets.Lock):
        held.check()


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Reads a JSON file of a workdir. Raises ValueError, with advice, if the file is damaged."""
    path = epath.Path(path)
    try:
        return _parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it, and start the same command of dense_jax.main "
            "again, which writes it anew"
        ) from error


def read_intact(path: epath.PathLike) -> dict[str, Any]:
    """Reads a JSON file of a workdir. Returns {} if the file is missing or damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def check_version(workdir: epath.Path) -> None:
    """Raises ValueError if this package does not read the workdir's format."""
    path = workdir / "environment.json"
    storage.check_format(path, read_json(path) if path.exists() else {}, VERSION)


def _parse(text: bytes) -> dict[str, Any]:
    match json.loads(text):
        case dict(value):
            return value
        case value:
            raise ValueError(f"{value!r} is no JSON object")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {dotted.path: value} for nested fields."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing_fields(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the dotted paths of the fields whose values differ between configs.

    Each config is a flat dict {dotted.path: value}. If every config has a `label`, any other field
    is returned only if it differs between configs with the same label.
    """

    def differ(path: str, some: Sequence[Mapping[str, Any]]) -> bool:
        absent = object()
        return len({json.dumps(c.get(path, absent), default=repr) for c in some}) > 1

    groups: dict[str, list[Mapping[str, Any]]] = {}
    for config in configs:
        groups.setdefault(json.dumps(config.get("label")), []).append(config)
    alike = [configs] if "null" in groups else list(groups.values())
    return [
        path
        for path in dict.fromkeys(path for config in configs for path in config)
        if (differ("label", configs) if path == "label" else any(differ(path, g) for g in alike))
    ]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], what: str = "") -> list[str]:
    """Returns a line for each key whose value changed. `what` comes before the key."""
    return [
        f"  {what}{key}: {old.get(key, 'not set')!r} there, {new.get(key, 'not set')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "not set") != new.get(key, "not set")
    ]


def compare(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Raises ValueError if the workdir holds a run with a different config, or of another format.

    The error lists the fields that differ. OPERATIONAL fields may differ, and data.root, because
    `compare_dataset` compares the data.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return
    check_version(path.parent)
    old, new = flatten(read_json(path)), flatten(storage.to_json(config.to_dict()))
    # A field that one of them lacks, because it is newer, is as good as None.
    absent, free = dict.fromkeys(old | new), dict.fromkeys((*OPERATIONAL, "data.root"))
    if different := differences(absent | old | free, absent | new | free):
        raise ValueError(
            f"{path.parent} has a run of another config; use another folder, or the same config to "
            "resume. The fields that differ:\n" + "\n".join(different)
        )


def compare_dataset(workdir: epath.PathLike, dataset: Mapping[str, Any], root: str) -> None:
    """Raises ValueError if the run in the workdir was started with different data.

    dataset: The content of dataset.json for the current data.
    root: The current config.data.root, which may differ if the data was moved.
    """
    path = epath.Path(workdir) / "dataset.json"
    if not path.exists():
        return
    old, new = read_json(path), storage.to_json(dataset)
    for facts in (old, new):
        facts["regions"] = regions.in_order(facts.get("regions"))
    config = path.parent / "config.json"
    before = flatten(read_json(config) if config.exists() else {}).get("data.root", root)
    moved = absolute(before) != absolute(root)
    where = f", from data.root={before} to {root}" if moved else ""
    for field, value in new.items():
        if field != "palette" and old.get(field) != value:
            what = f"{field} was {old.get(field)} and is {value}"
            if field.endswith("fingerprint"):
                split = "evaluation" if field.startswith("eval") else "training"
                described = "their description in dataset.json or groups.csv"
                what = f"the {split} files, or {described}, are different"
            raise ValueError(
                f"the dataset has changed since {path.parent} was started{where}: {what}. Restore "
                "the data, or use another --workdir"
            )


def runs(directory: epath.PathLike) -> list[epath.Path]:
    """Returns the workdirs in a folder: one subfolder per seed, or else the folder itself."""
    path = epath.Path(directory)
    children = path.iterdir() if path.is_dir() else ()  # glob would read [...] as a pattern
    seeds = [child for child in children if child.name.startswith("seed=")]
    return sorted(seeds, key=lambda seed: (len(seed.name), seed.name)) or [path]


def read(workdir: epath.PathLike, name: str) -> Any:
    """Reads the JSON file `name` of a run.

    Raises ValueError if the file is missing or damaged, or if the workdir has an unknown format.
    """
    path = epath.Path(workdir) / name
    if not path.exists():
        if (seeds := runs(workdir)) != [path.parent]:
            raise ValueError(
                f"{path.parent} has the workdirs of several seeds: name one of them, "
                f"{', '.join(map(str, seeds))}"
            )
        raise ValueError(f"{path} is missing: --workdir must be that of a run of dense_jax.main")
    check_version(path.parent)
    return read_json(path)


def read_records(path: epath.PathLike) -> list[dict[str, Any]]:
    """Returns the records in a metrics.jsonl file. Skips damaged lines with a warning.

    An incomplete last line, left by a killed process, is skipped without a warning.
    """
    path, records = epath.Path(path), []
    text = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            record = _parse(line)
            if type(record.get("step")) is not int:
                raise ValueError("it has no step")
            records.append(record)
        except ValueError as error:
            if line.endswith(b"\n"):
                _LOG.warning("%s, line %d is damaged and left out: %s", path, number, error)
    return records


def environment() -> dict[str, Any]:
    """Returns the content of environment.json: versions, devices and the git commit.

    The commit ends in "+" if tracked files have uncommitted changes.
    """
    import jax  # imported here, because `sweep` and `report` run without it

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = git("rev-parse", "HEAD").strip()
    changed = "+" if commit and git("status", "--porcelain", "--untracked-files=no") else ""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "git_commit": commit + changed or None,
        "python": platform.python_version(),
        "versions": {
            "dense_jax": dense_jax.__version__,
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "platform": platform.platform(),
        "num_hosts": jax.process_count(),
        "num_devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
    }
