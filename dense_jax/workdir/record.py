"""Writes the checkpoints, metrics and scores of a run to its workdir."""

import contextlib
import json
import logging
import math
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from dense_jax import metrics, storage
from dense_jax.workdir import curve, files
from dense_jax.workdir.checkpoint import Checkpoints
from dense_jax.workdir.logger import Logger

_LOG = logging.getLogger("dense_jax")
LATEST_TO_KEEP = 2  # the older checkpoint is a fallback


class RunFolder(NamedTuple):
    """Identifies the workdir of one run, without opening or locking it.

    title: The name of the run, or "" if there is only one run.
    experiment: The file that the config is from, if any.
    """

    path: epath.Path
    config: ConfigDict
    title: str = ""
    experiment: str | None = None

    @property
    def is_begun(self) -> bool:
        """Returns whether a run was started in this folder."""
        return (self.path / "config.json").exists()

    @property
    def result(self) -> dict[str, Any] | None:
        """Returns the content of result.json, or None if the run is not finished."""
        path = self.path / "result.json"
        return files.read_json(path) if path.exists() else None

    @property
    def contents(self) -> dict[str, Any]:
        """Returns {"latest": checkpoint names, "best": checkpoint names, "files": file names}.

        The possible file names are config.json and result.json.
        """
        names = {
            kind: sorted(step.name for step in (self.path / "checkpoints" / kind).glob("*"))
            for kind in ("latest", "best")
        }
        # Lists the folder, because network file systems may cache that a file was missing.
        listed = {path.name for path in self.path.glob("*")}
        return names | {"files": sorted(listed & {"config.json", "result.json"})}


class RunRecord:
    """The opened workdir of a run, locked against other processes until `close`.

    latest: The checkpoints to resume from. best: The checkpoint of the best evaluation.
    """

    def __init__(
        self,
        folder: RunFolder,
        dataset: Mapping[str, Any],
        initial_weights: Mapping[str, Any] | None = None,
    ):
        """Writes config.json, dataset.json and environment.json, and opens the checkpoints.

        Copies the experiment file when the run begins. A resumed run keeps the copy.

        dataset: The content of dataset.json.
        initial_weights: The origin of the weights that the run starts from. If None, keeps what
          environment.json says.

        Raises ValueError if another process trains in the workdir, or if a file has the name of a
        required folder.
        """
        self.path, self.config, self.title, experiment = folder
        if jax.process_index() == 0:
            # In a bucket, a folder exists while it holds objects, which this process writes.
            for name in ("", "checkpoints", "pictures", "tensorboard"):
                if (path := self.path / name).exists() and not path.is_dir():
                    raise ValueError(f"{path} is a file, but must be a folder: move it away")
            files.lock(self.path)
            path = self.path / "environment.json"
            if initial_weights is None and path.exists():
                initial_weights = files.read_json(path).get("initial_weights")
            command = shlex.join(["python", *sys.orig_argv[1:]])
            about = {"command": command, "initial_weights": initial_weights}
            about |= {"format_version": files.VERSION}
            storage.write_json(path, files.environment() | about)
            config = self.config.to_dict()
            config["data"]["root"] = files.absolute(config["data"]["root"])
            storage.write_json(self.path / "config.json", config)
            storage.write_json(self.path / "dataset.json", dataset)
            if experiment and not (copy := self.path / "experiment.py").exists():
                with storage.atomic(copy) as file:
                    file.write(epath.Path(experiment).read_bytes())
        self.latest = Checkpoints(self.path / "checkpoints" / "latest", LATEST_TO_KEEP)
        self.best = Checkpoints(self.path / "checkpoints" / "best", max_to_keep=1)
        self._first = 0
        self._log: Logger | None = None
        self._last_scores: Mapping[str, Any] = {}  # the step and scores of the last evaluation
        self._best_scores: Mapping[str, Any] | None = None  # the step and scores of `best`

    def rewind(self, step: int) -> None:
        """Deletes the checkpoints and records after `step`, and opens the log to continue there."""
        for checkpoints in (self.latest, self.best):
            for saved in checkpoints.steps:
                if saved > step:
                    checkpoints.remove(saved)
        self._first = step
        self._log = Logger(
            self.path, first_step=step, num_steps=self.config.num_steps, title=self.title
        )
        for saved in self.best.steps:
            try:
                self._best_scores = {"step": saved, **self.best.scores(saved)}
            except ValueError as error:
                _LOG.warning("%s; the next evaluation's state is the best so far", error)
                self.best.set_aside(saved)

    @property
    def log(self) -> Logger:
        """Returns the log of the run. Call `rewind` first."""
        assert self._log is not None
        return self._log

    def record(
        self, step: int, values: Mapping[str, float], names: Iterable[str], pace: str = ""
    ) -> None:
        """Logs the metrics of one training step.

        names: The names of the step's examples on this host.
        pace: The speed and the time left, as text.

        Raises FloatingPointError, naming the examples, if a metric is not finite.
        """
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(
                f"step {step}: {values} {files.NOT_FINITE} in {self.path}. Its examples on this host: "
                f"{', '.join(names) or 'none'}. The last good checkpoint is that of step "
                f"{max(self.latest.steps, default='none')}; lower optimizer.learning_rate or set "
                "optimizer.grad_clip_norm"
            )
        if step == self._first + 1 and values["train/grad_norm"] == 0:
            _LOG.warning(
                "%s: the gradient of the first step is exactly 0, so nothing is learned from its "
                "images. If they are not all background, look at the labels (dense_jax.data.doctor) "
                "and the weights of the loss",
                self.path,
            )
        is_logged = step % self.config.log_every == 0
        if is_logged:
            self.log.scalars(step, values)
        self.log.trained(step, values["train/loss"], pace, say=is_logged)

    def save(self, step: int, state: Any) -> None:
        """Saves a state to resume from."""
        files.check_lock(self.path)
        self.log.sync()  # a state on disk must not be ahead of its records
        self.latest.save(step, state)

    def score(
        self,
        step: int,
        state: Any,
        scores: Mapping[str, float],
        picture: np.ndarray | None,
        seconds: float,
    ) -> None:
        """Logs an evaluation, which took `seconds`, and saves the state if its mean IoU is the best."""
        self._last_scores = {"step": step, **scores}
        self.log.scalars(step, scores)
        self.log.evaluated(step, scores, seconds)
        if picture is not None:
            self.log.picture(step, picture)
        if self._best_scores is None or _rank(scores) > _rank(self._best_scores):
            self.log.sync()
            self.best.save(step, state, scores)
            self._best_scores = self._last_scores

    def keep_worst(self, picture: np.ndarray) -> None:
        """Writes worst.png, the worst images of the last evaluation."""
        if jax.process_index() == 0:
            with storage.atomic(self.path / "worst.png") as file:
                Image.fromarray(picture).save(file, format="PNG")

    def finish(
        self, num_parameters: int, cost: Mapping[str, Any], about: Mapping[str, Any]
    ) -> None:
        """Writes the learning curve and cost.json, then result.json with the final and best scores.

        about: What result.json says about the final scores.

        If this process trained no steps, an existing cost.json is kept.
        """
        result = {
            "status": "finished",
            "num_parameters": num_parameters,
            "metric_convention": metrics.CONVENTION,
            "final": self._last_scores,
            "best": self._best_scores,
            **about,
        }
        if jax.process_index() == 0:
            if cost["peak_bytes"] or not (self.path / "cost.json").exists():  # measured this time
                storage.write_json(self.path / "cost.json", cost)
            drawn = [curve.draw(self.path), *self.path.glob("worst.png")]
            storage.write_json(self.path / "result.json", result)
            print("wrote", *drawn)
        print(f"finished {self.path}: {summary(storage.to_json(result))}")

    def close(self) -> None:
        """Flushes everything, and releases the lock on the workdir."""
        with contextlib.ExitStack() as stack:  # closes each part, even if another raises
            stack.callback(files.unlock, self.path)
            for part in (self.latest, self.best, self._log):
                if part is not None:
                    stack.callback(part.close)


def summary(result: Mapping[str, Any]) -> str:
    """Returns the final and the best mean IoU in a result.json, as one line of JSON."""
    return json.dumps(
        {
            name: {"step": result[name]["step"], "mean_iou": result[name]["eval/mean_iou"]}
            for name in ("final", "best")
        }
    )


def _rank(scores: Mapping[str, Any]) -> float:
    """Returns the score that selects the best checkpoint: mean IoU, or 0 if no pixel is valid."""
    return float(np.nan_to_num(scores["eval/mean_iou"]))
