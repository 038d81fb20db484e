"""Reads a run from its folder, in which any file may be missing or truncated."""

import contextlib
import hashlib
import json
import math
import pathlib
import shlex
from typing import Any

import numpy as np

from dense_jax import storage
from dense_jax.data import decode, folds
from dense_jax.workdir import files

# Config fields that cannot change the final scores. `eval_every` can change the best step.
OPERATIONAL = {*files.OPERATIONAL, "eval_every"}
REPEATED = {"seed", "data.fold"}  # the config fields in which the runs of a row differ


class RunFolder:
    """The contents of a run's files, or {} for each unreadable file.

    A run without `scores` is left out of the tables. Its `status` says why.

    split: The split whose evaluation contains the scores. If None, the scores are from result.json.
      In that case, figures and pictures use the evaluation of the split evaluated in training.
    """

    def __init__(self, folder: pathlib.Path, root: pathlib.Path, split: str | None):
        self.folder = folder
        self.name = folder.relative_to(root).as_posix() if folder != root else root.resolve().name
        config = files.read_intact(folder / "config.json")
        self.fields = files.flatten(config)
        self.data = config.get("data", {})
        self.fold = self.data["fold"] if self.data.get("folds") else None
        self.config_hash = config_hash(self.fields)
        self.dataset, self.environment, self.cost, self.result, self.tuning, failure = (
            files.read_intact(folder / f"{name}.json")
            for name in ("dataset", "environment", "cost", "result", "tuning", "failure")
        )
        in_training = self.fields.get("data.eval_split") if self.fold is None else folds.FOLD
        evaluated = split or in_training
        # The fold that the scores are from. None if their split is the same for all runs.
        self.scored_fold = self.fold if evaluated == folds.FOLD else None
        self.is_scored_as_tuned = evaluated == in_training  # on the split that chose its rate
        self.evaluation = files.read_intact(folder / f"evaluation_{evaluated}.json")
        last, self.curve = read_curve(folder / "metrics.jsonl")  # pairs (step, mean IoU)
        self.measured: dict[str, str] = {}  # set by comparable.measure
        self.place = 0  # set by find_runs

        failed = ""
        if (folder / "failure.json").exists():
            failed = f"failed: {failure.get('error') or 'its failure.json does not say why'}"
        is_finished = bool(self.fields) and self.result.get("status") == "finished"
        self.final = self.result.get("final", {}) if is_finished else {}
        self.scores = self.evaluation if split and self.final else self.final
        # The result of `evaluation.baselines.compare`.
        comparison = self.evaluation if split else self.result
        self.baselines, self.below_baseline = (
            comparison.get(name, {}) for name in ("baselines", "below_baseline")
        )
        # If `scores` is empty, says why.
        self.status = failed or str(
            self.result.get(
                "status", f"unfinished, at step {last} of {self.fields.get('num_steps')}"
            )
        )
        if is_finished and split:
            flags = f"--workdir={folder}", f"--split={split}"
            command = shlex.join(["python", "-m", "dense_jax.evaluate", *flags])
            why = f" ({failed})" if failed else ""
            self.status = f"not evaluated on {split}{why}; do it with: {command}"
        elif not self.fields and not failed:
            self.status = "its config.json cannot be read"
        try:
            storage.check_format(folder / "environment.json", self.environment, files.VERSION)
        except ValueError as error:
            self.scores, self.status = {}, str(error)

    @property
    def scored_dataset(self) -> str:
        """Returns the name of the dataset that the scores are for."""
        return str(self.scores.get("dataset", self.fields.get("data.name")))

    @property
    def unit(self) -> str:
        """Returns which of the runs of a row this is: its fold, such as "fold 2", or its seed."""
        return str(self.fields.get("seed")) if self.fold is None else f"fold {self.fold}"

    @property
    def training_data(self) -> str:
        """Returns an identifier of the training data, usually 12 digits of its fingerprint.

        Data created in memory has no fingerprint, so its identifier is the dataset's name. If
        dataset.json is unreadable, the identifier contains data.root.
        """
        if not self.dataset:
            return f"unknown, at {self.fields.get('data.root')}"
        fingerprint = self.dataset.get("fingerprint")
        return str(fingerprint)[:12] if fingerprint else str(self.fields.get("data.name"))

    def array(self, name: str, shape: tuple[int, ...], kinds: str = "iu") -> np.ndarray | None:
        """Returns the array `name` from the evaluation's .npz file.

        Returns None if the array cannot be read or has another shape or dtype.

        shape: The required shape without the first axis.
        kinds: The accepted values of dtype.kind, one letter each.
        """
        path = self.folder / f"evaluation_{self.evaluation.get('split')}.npz"
        with contextlib.suppress(ValueError), decode.reading(str(path)), path.open("rb") as file:
            with np.load(file) as kept:
                array = kept[name]
            if array.dtype.kind in kinds and array.shape == (len(array), *shape):
                return array
        return None

    def images(self) -> tuple[tuple[str, ...], np.ndarray] | None:
        """Returns the names of the evaluation's images and their confusion matrices [n, c, c].

        With regions, the matrices are [n, r, 2, 2]. The run must have an evaluation. Returns None if
        the .npz file cannot be read or does not match evaluation_SPLIT.json.
        """
        shape = np.shape(self.evaluation["confusion_matrix"])
        names, matrices = self.array("names", (), "U"), self.array("confusion_matrices", shape)
        if names is None or matrices is None or len(names) != len(matrices):
            return None
        total = matrices.sum(axis=0, dtype=np.int64)
        is_same = np.array_equal(total, self.evaluation["confusion_matrix"])
        return (tuple(names.tolist()), matrices) if is_same else None


def find_runs(root: pathlib.Path, split: str | None) -> list[RunFolder]:
    """Returns the runs at or below `root`, in the order of their sweeps, and then all other runs.

    Sets `RunFolder.place`, and lists the fields that a sweep sets first, in the order of the sweep.
    The trials of a sweep's learning rates are not among the runs. Raises ValueError if there are
    no runs.
    """
    names = ("config.json", "failure.json")
    folders = sorted({path.parent for name in names for path in root.rglob(name)})
    if not folders:
        raise ValueError(f"no runs in {root}: no folder in it has a config.json")
    planned = _planned(root)
    runs = [RunFolder(folder, root, split) for folder in folders]
    for run in runs:
        # A run of several seeds has a folder for each seed.
        found = planned.get(run.folder) or planned.get(run.folder.parent)
        run.place, override = found or (len(planned), {})
        run.fields = {
            path: run.fields[path] for path in override if path in run.fields
        } | run.fields
    return sorted((run for run in runs if run.place >= 0), key=lambda run: run.place)


def _planned(root: pathlib.Path) -> dict[pathlib.Path, tuple[int, dict[str, Any]]]:
    """Returns {folder: (place, override)} of the runs of the sweeps at or below `root`.

    Runs of a sweep that differ only in the seed have the same place. Trials have the place -1.
    """
    places: dict[str, int] = {}
    planned = {}
    for path in sorted(root.rglob("sweep.json")):
        for name, run in files.read_intact(path).get("runs", {}).items():
            override = files.flatten(run)
            key = json.dumps([str(path), override | {"seed": None}], sort_keys=True)
            is_trial = name.startswith(f"{files.TRIALS}/")
            place = -1 if is_trial else places.setdefault(key, len(places))
            planned[path.parent / name] = place, override
    return planned


def config_hash(fields: dict[str, Any]) -> str:
    """Returns the first 12 hexadecimal digits of the SHA-256 hash of a config.

    The hash ignores REPEATED and OPERATIONAL fields, and data.root (paths differ between machines).
    """
    kept = {k: v for k, v in fields.items() if k not in OPERATIONAL | REPEATED | {"data.root"}}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def read_curve(path: pathlib.Path) -> tuple[int, list[tuple[float, float]]]:
    """Returns the last logged step, and the learning curve as pairs (step, mean IoU).

    If a step was logged twice, the later record wins.
    """
    records = files.read_records(path)
    scored = [record for record in records if record.get("eval/mean_iou") is not None]
    points = {float(record["step"]): record["eval/mean_iou"] for record in scored}
    return max((record["step"] for record in records), default=0), sorted(points.items())


def number(values: dict[str, Any], key: str) -> float:
    """Returns values[key], or NaN if it is null or missing."""
    value = values.get(key)
    return math.nan if value is None else float(value)
