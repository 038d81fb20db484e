"""Logs a run to metrics.jsonl, TensorBoard, pictures/ and the terminal.

Only process 0 writes. Metric names are paths such as `eval/mean_iou`.
"""

import functools
import json
import logging
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from dense_jax import buckets, storage
from dense_jax.spelling import decimal, duration
from dense_jax.workdir import files as workdirs

_LOG = logging.getLogger("dense_jax")
NUM_CLASSES = 6  # up to this number of classes, the line of an evaluation shows all
NUM_WORST = 4  # of more classes, it shows this number


class Logger:
    """The open log of one run.

    first_step: The step at which the run resumes, or 0. Later records and the evaluation at
      `first_step` are deleted, because they will be written again.
    title: The name of the run on a terminal that several runs share, or "" for a single run.
    """

    def __init__(self, workdir: epath.Path, *, first_step: int, num_steps: int, title: str = ""):
        self._active = jax.process_index() == 0
        self._first_step = first_step
        self._prefix = f"{title}, " if title else ""
        self._num_steps = num_steps
        if not self._active:
            return
        self._outbox = None
        folder = workdir
        if buckets.is_url(workdir):  # objects cannot be appended to, so `sync` copies whole files
            self._temporary = tempfile.TemporaryDirectory()
            folder = epath.Path(self._temporary.name)
            self._outbox = buckets.Outbox(Path(folder), str(workdir))
        self._events = folder / "tensorboard"
        self._pictures = folder / "pictures"
        kept = [
            record
            for record in workdirs.read_records(workdir / "metrics.jsonl")
            if record["step"] < first_step
            or (record["step"] == first_step and "eval/mean_iou" not in record)
        ]
        path = folder / "metrics.jsonl"
        storage.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a")
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm(
            desc=title or None,
            total=num_steps,
            initial=first_step,
            bar_format="{desc}{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix}",
            dynamic_ncols=True,
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

    def sync(self) -> None:
        """Waits until the values logged so far are on disk."""
        if self._active:
            storage.sync(self._file)
            if self._outbox is not None:
                self._tensorboard.flush()
                self._outbox.send()

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

    def trained(self, step: int, loss: float, pace: str, *, say: bool) -> None:
        """Shows a training step: beside the progress bar, or without a terminal, if `say`, as a line.

        pace: The speed and the time left, as text.
        """
        if not self._active:
            return
        texts = {"loss": f"loss {loss:.4f}"} | ({"pace": pace} if pace else {})
        if self._interactive:
            self._shown |= texts
            self._bar.set_postfix_str(", ".join(self._shown.values()), refresh=False)
            self._bar.update(step - self._bar.n)
        elif say:
            self._say(step, ", ".join(texts.values()))

    def evaluated(self, step: int, scores: Mapping[str, float], seconds: float) -> None:
        """Shows an evaluation in a line: its loss, mean IoU, IoU of classes, and its duration."""
        if self._active:
            mean = self._shown["mean_iou"] = f"mean IoU {decimal(scores['eval/mean_iou'])}"
            text = f"evaluation: {mean} ({_classes(scores)}), loss {scores['eval/loss']:.4f}"
            self._say(step, f"{text}, took {duration(seconds)}")
            if step == self._num_steps:
                self._shown.pop("pace", None)  # no time is left
            self._bar.set_postfix_str(", ".join(self._shown.values()))

    def _say(self, step: int, text: str) -> None:
        _LOG.info("%sstep %d/%d: %s", self._prefix, step, self._num_steps, text)

    def close(self) -> None:
        """Flushes and closes all outputs."""
        if self._active:
            self._file.close()
            self._tensorboard.close()
            if self._outbox is not None:
                self._outbox.send()
                self._temporary.cleanup()
            self._bar.close()


def _classes(scores: Mapping[str, float]) -> str:
    """Returns the IoU of each class, or of the worst classes if there are many."""
    ious = {name: iou for name, iou in scores.items() if name.startswith("eval/iou/")}
    scored = sorted(
        (iou, name.removeprefix("eval/iou/")) for name, iou in ious.items() if not math.isnan(iou)
    )
    shown = scored if len(scored) <= NUM_CLASSES else scored[:NUM_WORST]
    text = ", ".join(f"{name} {decimal(iou)}" for iou, name in shown)
    return text if shown == scored else f"worst of {len(scored)} classes: {text}"
