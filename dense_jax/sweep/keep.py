"""Keeps the small files of finished runs in a folder, such as one of a repository.

A sweep takes them as finished, so that it goes on where its workdirs are gone, or on another
machine. Kept are the JSON files, from metrics.jsonl the evaluations in training, and what a report
reads from an evaluation's .npz file: the confusion matrix of each image, and the errors by phase of
all images together. Checkpoints, pictures and predicted class maps are not kept. The folder of the
data is shortened to its name.
"""

import copy
import io
import json
import os
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dense_jax import storage
from dense_jax.workdir import files

CONFIG = "config.json"


def portable(sweep: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of sweep.json without the folder of the data, which may move."""

    def without(fields: dict[str, Any]) -> dict[str, Any]:
        return {path: value for path, value in fields.items() if path != "data.root"}

    runs = {name: without(override) for name, override in sweep["runs"].items()}
    return sweep | {"flags": without(sweep["flags"]), "runs": runs}


def restore(kept: epath.Path, workdir: epath.Path, config: ConfigDict, split: str | None) -> None:
    """Copies a kept run to its workdir, unless it is there. Does nothing if no run was kept.

    config: The config that the sweep has for the run.
    split: The split on which the run must have been evaluated, if any.

    Raises ValueError if the kept run has another config or lacks the evaluation, or if the workdir
    has a run of its own.
    """
    runs = files.runs(kept)
    if not all((run / CONFIG).exists() for run in runs):
        return
    is_new = True
    if len(runs) != config.num_seeds:
        raise ValueError(f"{kept} has {len(runs)} seeds, but num_seeds={config.num_seeds}")
    for number, run in enumerate(runs):
        own_config = copy.deepcopy(config)
        own_config.seed += number
        files.compare(run, own_config)
        own = workdir / run.relative_to(kept)
        if (own / CONFIG).exists():
            is_new = False
            result = own / "result.json"
            if not result.exists() or result.read_bytes() != (run / "result.json").read_bytes():
                raise ValueError(f"{own} and {run} are not the same run: remove one of them")
        elif split and not (run / f"evaluation_{split}.json").exists():
            raise ValueError(
                f"{run} was not evaluated on {split}, and its checkpoints were not kept: remove "
                f"the folder to train it again, or sweep without --evaluate={split}"
            )
    if is_new:
        save(kept, workdir)


def save(source: epath.Path, target: epath.Path) -> None:
    """Copies the small files of a finished run, or those of each of its seeds."""
    for run in files.runs(source):
        folder = target / run.relative_to(source)
        names = [path.name for path in run.iterdir()]
        evaluations = [name for name in names if name.startswith("evaluation_")]
        # `plan.is_evaluated` needs evaluations that are newer than the result. The config is last,
        # because it says that the copy is complete.
        ordered = ["result.json", *sorted(evaluations, reverse=True), "metrics.jsonl"]
        ordered += ["dataset.json", "environment.json", "cost.json", files.TUNING, CONFIG]
        for name in ordered:
            if name in names and name.endswith((".json", ".jsonl", ".npz")):
                with storage.atomic(folder / name) as file:
                    file.write(_small(name, (run / name).read_bytes()))


def _small(name: str, content: bytes) -> bytes:
    """Returns the kept content of a file."""
    if name == "metrics.jsonl":
        lines = content.splitlines(keepends=True)
        return b"".join(line for line in lines if b'"eval/' in line)
    if name.startswith("evaluation_") and name.endswith(".json"):
        fields = json.loads(content)
        return _text(fields | {"root": os.path.basename(fields["root"])})
    if name.endswith(".npz"):
        with np.load(io.BytesIO(content)) as measured:
            arrays = {key: measured[key] for key in ("names", "confusion_matrices")}
            if "phase_errors" in measured:
                arrays["phase_errors"] = measured["phase_errors"].sum(axis=0, keepdims=True)
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()
    if name == CONFIG:
        config = json.loads(content)
        config["data"]["root"] = os.path.basename(config["data"]["root"])
        return _text(config)
    return content


def _text(fields: dict[str, Any]) -> bytes:
    return f"{json.dumps(fields, indent=2)}\n".encode()
