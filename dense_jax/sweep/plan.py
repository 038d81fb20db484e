"""The names, flags and statuses of the runs of a sweep. Never imports jax."""

import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath  # like pathlib, but also supports gs://

from dense_jax import command, storage
from dense_jax.workdir import files

Override = dict[str, Any]  # {dotted.path: value}, the changes to the config for one run

FAILURE = "failure.json"  # in the workdir of a run that failed
MAX_NAME = 200  # characters; file systems allow 255 bytes


def load_sweep(config: str) -> list[Override]:
    """Returns the result of `get_sweep()` in an experiment file. Raises ValueError if invalid."""
    module, file = command.experiment(config), config.partition(":")[0]
    if not hasattr(module, "get_sweep"):
        raise ValueError(f"{file} has no get_sweep(): to train it once, use dense_jax.main")
    sweep = module.get_sweep()
    if not isinstance(sweep, list) or not all(isinstance(override, dict) for override in sweep):
        raise ValueError(f"get_sweep() of {file} must return a list of dicts, got {sweep!r}")
    if not sweep:
        raise ValueError(f"get_sweep() of {file} is an empty list: nothing to run")
    return sweep


def as_flags(override: Override) -> list[str]:
    """Returns the command-line flags for an override. Raises ValueError if a value is None."""
    for path, value in override.items():
        if value is None:  # the run would get the string "None", or nothing
            raise ValueError(f"{path}=None cannot be written as a flag; use a value that means off")
    return [f"--config.{path}={value}" for path, value in override.items()]


def run_names(sweep: Sequence[Override]) -> list[str]:
    """Returns a folder name for each run, such as `upsampling=bilinear,skips=4-2,seed=0`.

    A name lists the fields that differ between the runs. If all runs have the field `label`, other
    fields are listed only if they differ between runs with equal `label`. The seed is always
    listed, so that names do not change when seeds are added.

    Raises ValueError if two runs would share a folder, or if a name is too long.
    """
    differing = {"seed", "label", *files.differing_fields(sweep)}
    paths = [path for path in dict.fromkeys(p for run in sweep for p in run) if path in differing]
    paths.sort(key="seed".__eq__)  # the seed comes last
    names: list[str] = []
    taken: dict[str, int] = {}
    for index, override in enumerate(sweep):
        parts = [
            f"{_short(path, paths)}={_text(override[path])}" for path in paths if path in override
        ]
        name = ",".join(parts) or "default"
        if len(name) > MAX_NAME:
            raise ValueError(f"run {index} has a name of {len(name)} characters, over {MAX_NAME}")
        other = taken.setdefault(name.casefold(), index)  # some file systems ignore case
        if other != index:
            raise ValueError(
                f"runs {other} and {index} of the sweep would share the folder {name!r}: "
                f"{sweep[other]} and {override}; make them differ or remove one"
            )
        names.append(name)
    return names


def _short(path: str, paths: Sequence[str]) -> str:
    """Drops leading words from a dotted path, as long as the rest is unique in `paths`."""
    words = path.split(".")
    ends = (".".join(words[i:]) for i in reversed(range(len(words))))
    others = [f".{other}" for other in paths if other != path]
    return next((end for end in ends if not any(o.endswith(f".{end}") for o in others)), path)


def _text(value: Any) -> str:
    """Returns a value as text that is safe in file names, shells and bucket paths."""
    if isinstance(value, dict):
        return "-".join(f"{key}-{_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "-".join(map(_text, value)) or "none"
    text = re.sub(r" *([+*]) *", r"\1", str(value))  # "a + 3 * b" becomes "a+3_b"
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text) or "none"


def status(workdir: epath.Path) -> str:
    """Returns a run's status: `finished`, `failed`, `unfinished` (can resume) or `new`."""
    if (workdir / FAILURE).exists():
        return "failed"
    if is_finished(workdir):
        return "finished"
    return "unfinished" if workdir.exists() else "new"


def is_finished(workdir: epath.Path) -> bool:
    """Returns whether the run in the workdir, or that of each seed there, has finished."""
    results = [files.read_intact(run / "result.json") for run in files.runs(workdir)]
    return all(result.get("status") == "finished" for result in results)


def is_evaluated(workdir: epath.Path, split: str) -> bool:
    """Returns whether all runs in the workdir were evaluated on `split` after they finished."""

    def is_newer(run: epath.Path) -> bool:
        evaluation, result = run / f"evaluation_{split}.json", run / "result.json"
        return evaluation.exists() and evaluation.stat().mtime >= result.stat().mtime

    return is_finished(workdir) and all(map(is_newer, files.runs(workdir)))


def remember(directory: epath.Path, content: dict[str, Any]) -> list[str]:
    """Writes sweep.json. Returns the names of started runs that are no longer in the sweep.

    content: The new content of sweep.json: the config file, the flags {dotted path: text}, the
      split to evaluate, and the runs {name: override}.

    Raises ValueError if the config, the flags or the override of a started run (one that has a
    config.json) changed, because old and new results would be mixed, or if `directory` cannot hold
    checkpoints.
    """
    files.check_path(directory)
    path = directory / "sweep.json"
    old = files.read_intact(path)
    begun = {
        name: override
        for name, override in old.get("runs", {}).items()
        if any((run / "config.json").exists() for run in files.runs(directory / name))
    }
    new = json.loads(json.dumps(content))  # as read back from JSON, where tuples become lists
    if begun:
        different = files.differences({"": old["config"]}, {"": new["config"]}, "--config")
        different += files.differences(old["flags"], new["flags"], "--config.")
        for name in begun.keys() & new["runs"].keys():
            different += files.differences(begun[name], new["runs"][name], f"{name}: ")
        if different:
            raise ValueError(
                f"{directory} has runs of another config. Use another folder, or start the "
                "sweep as before. What differs:\n" + "\n".join(different)
            )
    storage.write_json(path, new | {"runs": new["runs"] | begun})
    return [name for name in begun if name not in new["runs"]]
