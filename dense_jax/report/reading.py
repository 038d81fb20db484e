"""One run, as its folder tells it: any file may be missing, cut off, or from another version."""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import shlex
import sys
from typing import Any

import numpy as np

from dense_jax.data import decode
from dense_jax.workdir import files as workdir

# How a run is carried out, not what its final scores are. With another eval_every another step may
# be the best one.
OPERATIONAL = {*workdir.OPERATIONAL, "eval_every"}


@dataclasses.dataclass
class Run:
    name: str  # of its folder, from the report's
    folder: pathlib.Path
    fields: dict[str, Any]  # of the config: dotted path -> value
    config_hash: str
    # The files of these names; {} where there is none.
    dataset: dict[str, Any]
    environment: dict[str, Any]
    cost: dict[str, Any]
    result: dict[str, Any]
    final: dict[str, Any] | None  # scores of result.json; None: not finished
    evaluation: dict[str, Any] | None  # evaluation_SPLIT.json; None: not evaluated on the split
    scores: dict[str, Any] | None  # one of these two; None: not in the table
    status: str
    curve: list[tuple[float, float]]  # (step, mean IoU), in the order of steps
    measured: dict[str, str] = dataclasses.field(default_factory=dict)  # see `comparable`

    @property
    def training_data(self) -> str:
        """Equal for runs that were trained on the same data, wherever it lay.

        The fingerprint's first 12 digits; data made in memory has a name only. Without a
        dataset.json nothing but the place is known.
        """
        if not self.dataset:
            return f"unknown, at {self.fields.get('data.root')}"
        fingerprint = self.dataset.get("fingerprint")
        return str(fingerprint)[:12] if fingerprint else str(self.fields.get("data.name"))


def find_runs(root: pathlib.Path, split: str | None) -> list[Run]:
    """Those at or below `root`; ValueError if there are none."""
    names = ("config.json", "failure.json")
    folders = sorted({path.parent for name in names for path in root.rglob(name)})
    if not folders:
        raise ValueError(f"no runs in {root}: no folder in it has a config.json")
    return [read_run(folder, root, split) for folder in folders]


def read_run(folder: pathlib.Path, root: pathlib.Path, split: str | None) -> Run:
    """split: whose evaluation has the scores; None: they are result.json's.

    Then the evaluation, of what the scores do not tell, is that of the config's data.eval_split.
    """
    name = folder.relative_to(root).as_posix() if folder != root else root.resolve().name
    config, result = read_json(folder / "config.json"), read_json(folder / "result.json") or {}
    fields = workdir.flatten(config or {})
    last, curve = read_curve(folder / "metrics.jsonl")
    failed = ""
    if (folder / "failure.json").exists():
        failure = read_json(folder / "failure.json") or {}
        failed = f"failed: {failure.get('error') or 'its failure.json does not say why'}"
    final = None
    if config is None:
        status = "its config.json cannot be read"
    else:
        status = str(
            result.get("status", f"unfinished, at step {last} of {fields.get('num_steps')}")
        )
    if status == "finished":
        final = mapping(result.get("final")) or None
        if final is None:
            status = "finished, but its result.json has no final scores"
    elif failed:
        status = failed
    evaluated_split = fields.get("data.eval_split") if split is None else split
    evaluation = read_evaluation(folder / f"evaluation_{evaluated_split}.json")
    if final is not None and split is not None and evaluation is None:
        command = ["python", "-m", "dense_jax.evaluate", f"--workdir={folder}", f"--split={split}"]
        why = f" ({failed})" if failed else ""
        status = f"not evaluated on {split}{why}; do it with: {shlex.join(command)}"
    return Run(
        name=name,
        folder=folder,
        fields=fields,
        config_hash=config_hash(fields),
        dataset=read_json(folder / "dataset.json") or {},
        environment=read_json(folder / "environment.json") or {},
        cost=read_json(folder / "cost.json") or {},
        result=result,
        final=final,
        evaluation=evaluation,
        scores=final if split is None or final is None else evaluation,
        status=status,
        curve=curve,
    )


def config_hash(fields: dict[str, Any]) -> str:
    """12 hexadecimal digits of the SHA-256 of a config, flat, as JSON with sorted keys, no spaces.

    Without the seed, what is operational and data.root, a place on one machine.
    """
    kept = {k: v for k, v in fields.items() if k not in OPERATIONAL | {"seed", "data.root"}}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """None where there is no such file, or a crash cut it off."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_evaluation(path: pathlib.Path) -> dict[str, Any] | None:
    """None where there is no such file, or one without a count for each two of its classes."""
    evaluation = read_json(path) or {}
    try:
        counts = np.array(evaluation["confusion_matrix"], np.float64)
        length = len(evaluation["class_names"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    is_whole = counts.shape == (length, length) and ((counts >= 0) & (counts < math.inf)).all()
    return evaluation if is_whole and isinstance(evaluation.get("split"), str) else None


def read_array(
    run: Run, name: str, of_each: tuple[int, ...], kinds: str = "iu"
) -> np.ndarray | None:
    """An array [n, *of_each] of n images from evaluation_SPLIT.npz; None where it cannot be read.

    kinds: of its type, as numpy letters them.
    """
    path = run.folder / f"evaluation_{mapping(run.evaluation).get('split')}.npz"
    with contextlib.suppress(ValueError), decode.reading(str(path)), path.open("rb") as file:
        with np.load(file) as kept:
            array = kept[name]
        if array.dtype.kind in kinds and array.shape == (len(array), *of_each):
            return array
    return None


def read_curve(path: pathlib.Path) -> tuple[int, list[tuple[float, float]]]:
    """The last step logged, and mean IoU by step; a step done again after a restart counts once."""
    last, points = 0, {}
    try:
        records = workdir.read_records(path)
    except (OSError, ValueError, RecursionError):  # damaged: the scores do not need it
        return 0, []
    for record in map(mapping, records):
        step = number(record, "step")
        if math.isnan(step):
            continue
        last = max(last, int(step))
        if not math.isnan(value := number(record, "eval/mean_iou")):
            points[step] = value
    return last, sorted(points.items())


def number(values: dict[str, Any], key: str) -> float:
    """NaN for whatever is no finite number."""
    value = values.get(key)
    is_finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return float(value) if is_finite else math.nan


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
