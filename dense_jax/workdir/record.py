"""One run of a job: its workdir, checkpoints, records and scores. A job trains one for each seed."""

import contextlib
import copy
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dense_jax import metrics, storage
from dense_jax.workdir import checkpoint, logger
from dense_jax.workdir import files as workdir

_LOG = logging.getLogger("dense_jax")
LATEST_TO_KEEP = 2  # one to fall back to


class Member:
    """What a run leaves in its workdir, from `open` and `start` to `finish`."""

    def __init__(self, path: epath.Path, config: ConfigDict, title: str = ""):
        """Raises ValueError if the workdir is another config's."""
        workdir.compare(path, config)
        self.path = path
        self.config = config
        self._title = title

    @property
    def result(self) -> dict[str, Any] | None:
        """result.json, of a finished run."""
        path = self.path / "result.json"
        return workdir.read_json(path) if path.exists() else None

    @property
    def contents(self) -> dict[str, Any]:
        """Lists the run's checkpoints and files, before it is opened."""
        held = {
            kind: sorted(each.name for each in (self.path / "checkpoints" / kind).glob("*"))
            for kind in ("latest", "best")
        }
        # From a listing: a network file system may remember for long that a file was missing.
        there = {each.name for each in self.path.glob("*")}
        return held | {"files": sorted(there & {"config.json", "result.json"})}

    def open(self, dataset: Mapping[str, Any]) -> None:
        """Says in the workdir what the run is, and opens its checkpoints.

        dataset: as in dataset.json. Raises ValueError if another process trains in the workdir, or a
        file is where a folder must be.
        """
        for name in ("", "checkpoints", "pictures", "tensorboard"):
            if (folder := self.path / name).exists() and not folder.is_dir():
                raise ValueError(f"{folder} is a file, but must be a folder: move it away")
        if jax.process_index() == 0:
            workdir.lock(self.path)
            config = self.config.to_dict()
            config["data"]["root"] = workdir.absolute(config["data"]["root"])
            storage.write_json(self.path / "config.json", config)
            storage.write_json(self.path / "dataset.json", dataset)
            storage.write_json(self.path / "environment.json", workdir.environment())
        self.latest = checkpoint.Checkpoints(self.path / "checkpoints" / "latest", LATEST_TO_KEEP)
        self.best = checkpoint.Checkpoints(self.path / "checkpoints" / "best", max_to_keep=1)

    def start(self, step: int) -> None:
        """Forgets the future of a step, which is about to happen again, and opens the records."""
        for held in (self.latest, self.best):
            for there in held.steps:
                if there > step:
                    held.remove(there)
        self._first = step
        self._log = logger.Logger(
            self.path, first_step=step, num_steps=self.config.num_steps, title=self._title
        )
        self._best: Mapping[str, Any] | None = None  # the step and scores of `best`
        for held in self.best.steps:
            try:
                self._best = {"step": held, **self.best.scores(held)}
            except ValueError as error:
                _LOG.warning("%s; the next evaluation's state is the best so far", error)
                self.best.set_aside(held)

    def record(self, step: int, values: Mapping[str, float], names: Iterable[str]) -> None:
        """Logs a step's metrics. Raises FloatingPointError, with the examples, if one is not finite.

        names: of the step's examples on this host.
        """
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(
                f"step {step}: {values} is not finite in {self.path}. Its examples on this host: "
                f"{', '.join(names) or 'none'}. The last good checkpoint is that of step "
                f"{max(self.latest.steps, default='none')}; lower optimizer.learning_rate or set "
                "optimizer.grad_clip_norm"
            )
        if step == self._first + 1 and values["train/grad_norm"] == 0:
            _LOG.warning(
                "%s: the gradient of the first step is exactly 0, so that nothing is learned: "
                "look at the labels (dense_jax.data.doctor) and the weights of the loss",
                self.path,
            )
        if step % self.config.log_every == 0:
            self._log.scalars(step, values)
        self._log.progress(step, loss=values["train/loss"])

    def save(self, step: int, state: Any) -> None:
        """Saves the state to go on from."""
        self._log.sync()  # a state on disk must not be ahead of its records
        self.latest.save(step, state)

    def score(
        self, step: int, state: Any, scores: Mapping[str, float], picture: np.ndarray | None
    ) -> None:
        """Records an evaluation, and saves the state if none before was as good."""
        self._last = {"step": step, **scores}
        self._log.scalars(step, scores)
        self._log.progress(step, mean_iou=scores["eval/mean_iou"])
        if picture is not None:
            self._log.picture(step, picture)
        if self._best is None or _rank(scores) > _rank(self._best):
            self._log.sync()
            self.best.save(step, state, scores)
            self._best = self._last

    def finish(self, num_parameters: int, cost: Mapping[str, Any]) -> None:
        """Writes cost.json and then result.json, the final scores and the best ones.

        A start that had nothing left to do but this leaves the cost that an earlier one measured.
        """
        result = {
            "status": "finished",
            "num_parameters": num_parameters,
            "metric_convention": metrics.CONVENTION,
            "final": self._last,
            "best": self._best,
        }
        if jax.process_index() == 0:
            if cost["peak_bytes"] or not (self.path / "cost.json").exists():  # this start measured
                storage.write_json(self.path / "cost.json", cost)
            storage.write_json(self.path / "result.json", result)
        print(f"finished {self.path}: {summary(storage.to_json(result))}")

    def close(self) -> None:
        """Flushes everything."""
        with contextlib.ExitStack() as stack:  # each, whatever the others raise
            stack.callback(workdir.unlock, self.path)
            for opened in (self.latest, self.best, self._log):
                stack.callback(opened.close)


def members(config: ConfigDict, path: epath.Path) -> list[Member]:
    """The runs of a job: that of config.seed in the workdir itself, or one per seed below it.

    Those of several seeds are WORKDIR/seed=S, S from config.seed on: workdirs like any other.
    """
    if config.num_seeds == 1:
        if not (path / "config.json").exists() and any(
            (seed / "config.json").exists() for seed in workdir.runs(path)
        ):
            raise ValueError(
                f"{path} has the workdirs of several seeds: use another --workdir for one"
            )
        return [Member(path, config)]
    if (path / "config.json").exists():
        raise ValueError(
            f"{path} is the workdir of one run: use another --workdir for num_seeds={config.num_seeds}"
        )
    each = []
    for seed in range(config.seed, config.seed + config.num_seeds):
        of_seed = copy.deepcopy(config)
        of_seed.update(seed=seed, num_seeds=1)
        each.append(Member(path / f"seed={seed}", of_seed, f"seed={seed}"))
    new = [one.path for one in each if not (one.path / "config.json").exists()]
    latest = {one.path: one.path / "checkpoints" / "latest" for one in each}
    begun = [path for path, folder in latest.items() if folder.is_dir() and any(folder.iterdir())]
    if new and begun:
        raise ValueError(
            f"{begun[0]} was begun without {new[0]}: they cannot train together. Use another "
            "--workdir, or train each in its own, with --config.num_seeds=1 and its --config.seed"
        )
    return each


def restore(job: Sequence[Member], like: Any) -> list[Any] | None:
    """The members' states at the newest step that all of them can go on from; None at the start.

    like: as of `Checkpoints.restore`. Raises ValueError if a member has gone on by itself.
    """
    states = [each.latest.restore_latest(like) for each in job]
    steps = [0 if state is None else int(state.step) for state in states]
    first = min(steps)
    for k, (each, step) in enumerate(zip(job, steps, strict=True)):
        # The job was cut off while it saved: some have one checkpoint more.
        there = each.latest.steps
        if step > first and (each.result or first not in (there if len(there) > 1 else [0])):
            raise ValueError(
                f"{each.path} is at step {step}, but another seed at {first}: they no longer train "
                f"together. Finish each in its workdir, with --config.seed={each.config.seed} and so on"
            )
        if step > first > 0:
            states[k] = each.latest.restore(first, like)
    return states if first else None


def summary(result: Mapping[str, Any]) -> str:
    """The scores of a result.json in one line."""
    return json.dumps(
        {
            name: {"step": result[name]["step"], "mean_iou": result[name]["eval/mean_iou"]}
            for name in ("final", "best")
        }
    )


def _rank(scores: Mapping[str, Any]) -> float:
    """What the best checkpoint is the best in; a split without any valid pixel counts as 0."""
    return float(np.nan_to_num(scores["eval/mean_iou"]))
