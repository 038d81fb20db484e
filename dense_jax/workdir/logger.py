"""Logs a run to metrics.jsonl, TensorBoard, pictures/ and the terminal.

Only process 0 writes. Metric names are paths such as `eval/mean_iou`.
"""

import functools
import json
import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from dense_jax import storage
from dense_jax.workdir import files as workdirs

_LOG = logging.getLogger("dense_jax")


class Logger:
    """The open log of one run.

    first_step: The step at which the run resumes, or 0. Later records and the evaluation at
      `first_step` are deleted, because they will be written again.
    title: The name of the run on a terminal that several runs share, or "" for a single run.
    """

    def __init__(self, workdir: epath.Path, *, first_step: int, num_steps: int, title: str = ""):
        self._active = jax.process_index() == 0
        self._first_step = first_step
        self._path = workdir / "metrics.jsonl"
        self._events = workdir / "tensorboard"
        self._pictures = workdir / "pictures"
        self._title = title
        if not self._active:
            return
        kept = [
            record
            for record in workdirs.read_records(self._path)
            if record["step"] < first_step
            or (record["step"] == first_step and not _is_eval(record))
        ]
        storage.write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("a")
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm(
            desc=title or None,
            total=num_steps,
            initial=first_step,
            unit="step",
            disable=not self._interactive,
        )
        self._shown: dict[str, str] = {}

    @functools.cached_property
    def _tensorboard(self):
        # Imported at the first record, while the device is busy. The import is slow if torch is
        # installed, because tensorboardX imports torch.
        import tensorboardX

        purge_step = self._first_step + 1 if self._first_step else None
        return tensorboardX.SummaryWriter(str(self._events), purge_step=purge_step)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs {metric name: value}. NaN (an undefined score) becomes null."""
        if not self._active:
            return
        self._file.write(json.dumps(storage.to_json({"step": step, **scalars})) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            if not math.isnan(value):
                self._tensorboard.add_scalar(name, value, step)
        if not self._interactive:
            shown = (f"{k} {v:.4g}" for k, v in scalars.items() if k.count("/") == 1)
            _LOG.info("%sstep %d: %s", self._title and f"{self._title}, ", step, ", ".join(shown))

    def sync(self) -> None:
        """Waits until the values logged so far are on disk."""
        if self._active:
            storage.sync(self._file)

    def picture(self, step: int, picture: np.ndarray) -> None:
        """Writes a picture to pictures/STEP.png and to TensorBoard."""
        if not self._active:
            return
        self._pictures.mkdir(exist_ok=True)
        with (self._pictures / f"{step:07d}.png").open("wb") as file:
            Image.fromarray(picture).save(file, format="PNG")
        self._tensorboard.add_image(
            "eval/input_truth_prediction_errors", picture, step, dataformats="HWC"
        )

    def progress(self, step: int, **shown: float) -> None:
        """Advances the progress bar, if any, to `step`, and updates the values beside the bar."""
        if self._active and self._interactive:
            self._shown |= {name: f"{value:.4f}" for name, value in shown.items()}
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Flushes and closes all outputs."""
        if self._active:
            self._file.close()
            self._tensorboard.close()
            self._bar.close()


def _is_eval(record: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in record)
