"""The small files of a run: what was asked for, on what, and what came out.

config.json       the whole config, as nested objects
dataset.json      class names, palette and number of channels: enough to predict without the data
environment.json  versions, git commit and devices, of the run's latest start
metrics.jsonl     one object per line: the step, and values by their path
cost.json         FLOPs, memory and speed, written when the run is finished
result.json       written when the run is finished
"""

import importlib.metadata
import json
import logging
import math
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

# Fields that may change between two starts of a run: they do not change its numbers.
OPERATIONAL = (
    *("checkpoint_every", "log_every", "eval.batch_size", "eval.num_pictures"),
    *("data.workers", "data.cache", "data.verify", "num_seeds"),
)

_LOG = logging.getLogger("dense_jax")


def to_json(value: Any) -> Any:
    """Plain JSON values; NaN, a score that does not exist, becomes null."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [to_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a file that is either the old or the new one, whenever the process dies."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / (path.name + ".tmp")
    unfinished.write_text(json.dumps(to_json(value), indent=2) + "\n")
    unfinished.replace(path)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields -> {dotted.path: value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def compare(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Raises ValueError, listing the fields that differ, if the workdir is another config's."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return
    old, new = flatten(json.loads(path.read_text())), flatten(to_json(config.to_dict()))
    different = [
        f"  {field}: {old.get(field)!r} there, {new.get(field)!r} now"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field) and field not in OPERATIONAL
    ]
    if different:
        raise ValueError(
            f"{path.parent} is the workdir of another config; use another --workdir, or the same "
            "config to resume. The fields that differ:\n" + "\n".join(different)
        )


def compare_dataset(workdir: epath.PathLike, dataset: Mapping[str, Any]) -> None:
    """Raises ValueError if a run to be resumed was started on other data; warns if files changed.

    dataset: as in dataset.json.
    """
    path = epath.Path(workdir) / "dataset.json"
    if not path.exists():
        return
    old, new = json.loads(path.read_text()), to_json(dataset)
    for field in ("class_names", "num_channels", "num_examples", "image_size"):
        if old[field] != new[field]:
            raise ValueError(
                f"the dataset has changed since {path.parent} was started: {field} was "
                f"{old[field]} and is {new[field]}. Restore the data, or use another --workdir"
            )
    if old["fingerprint"] != new["fingerprint"]:
        _LOG.warning("the dataset's files are not those that %s was started on", path.parent)


def runs(directory: epath.PathLike) -> list[epath.Path]:
    """The workdirs of the runs that one command trained: the directory, or those of its seeds."""
    path = epath.Path(directory)
    return sorted(path.glob("seed=*"), key=lambda seed: (len(seed.name), seed.name)) or [path]


def read(workdir: epath.PathLike, name: str) -> Any:
    """One of the JSON files. Raises ValueError if this is no workdir of one run."""
    path = epath.Path(workdir) / name
    if not path.exists():
        if (seeds := runs(workdir)) != [path.parent]:
            raise ValueError(
                f"{path.parent} has the workdirs of several seeds: name one of them, "
                f"{', '.join(map(str, seeds))}"
            )
        raise ValueError(f"{path} is missing: --workdir must be that of a run of dense_jax.main")
    return json.loads(path.read_text())


def read_records(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a line cut off by a kill is left out."""
    path, records = epath.Path(path), []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def environment() -> dict[str, Any]:
    """Versions, git commit (with "+" where files were changed) and devices."""

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
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "num_hosts": jax.process_count(),
        "num_devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
    }
