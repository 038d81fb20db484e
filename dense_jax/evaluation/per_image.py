"""Measures the scores that need an image's whole class map, in processes that never import JAX."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any
from unittest import mock

import cv2
import numpy as np
from tqdm import tqdm

from dense_jax import metrics
from dense_jax.data import workers
from dense_jax.labels import IGNORE_LABEL, components
from dense_jax.metrics import boundary

PERIOD = 16  # in pixels; a multiple of all upsampling strides: 2, 4, 8 and 16


def measure(
    prediction: np.ndarray, label: np.ndarray, num_classes: int, foreground: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """Returns {name: value} for one image: all boundary metrics, trimap_iou and phase_errors.

    prediction, label: Class maps [h, w], or masks [h, w, r] of regions, which take the place of the
      classes. Errors are then those of all regions.
    foreground: The indices of the foreground classes. If not empty, object metrics are included. An
      object is a connected component of the foreground.
    """
    if prediction.ndim == 3:
        sides = (np.moveaxis(masks, -1, 0) for masks in (prediction, label))
        parts = [measure(*pair, num_classes=2) for pair in zip(*sides, strict=True)]
        names = [metric.name for metric in metrics.of_kind("boundary")]
        return {
            **{name: np.stack([part[name][1] for part in parts]) for name in names},
            "trimap_iou": np.stack([part["trimap_iou"][:, 1] for part in parts], axis=1),
            "phase_errors": np.sum([part["phase_errors"] for part in parts], axis=0),
        }
    maps = boundary.MapPair(prediction, label, num_classes)
    measured = {metric.name: metric.function(maps) for metric in metrics.of_kind("boundary")}
    measured["trimap_iou"] = boundary.trimap_iou(maps)
    measured["phase_errors"] = phase_errors(prediction, label)
    if foreground:
        valid = label != IGNORE_LABEL
        truth, guess = (
            components((np.isin(classes, foreground) & valid).astype(np.uint8), [1])
            for classes in (label, prediction)
        )
        for metric in metrics.of_kind("object"):
            measured[metric.name] = np.array(metric.function(guess, truth))
    return measured


def phase_errors(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Returns the numbers of wrong and of valid pixels at each phase, int64 [PERIOD, PERIOD, 2].

    The phase of a pixel is (y mod PERIOD, x mod PERIOD). More errors at some phases suggest
    upsampling artifacts (Odena et al. 2016, "Deconvolution and checkerboard artifacts"). If the
    image is resized or has several tiles, the phases may not match the network's strides.
    """
    valid = label != IGNORE_LABEL
    counts = np.stack([valid & (prediction != label), valid], axis=-1)
    rows, columns = (-length % PERIOD for length in label.shape)
    cells = np.pad(counts, ((0, rows), (0, columns), (0, 0)))
    cells = cells.reshape(-1, PERIOD, cells.shape[1] // PERIOD, PERIOD, 2)
    return cells.sum(axis=(0, 2), dtype=np.int64)


class Pool:
    """Measures images as their predictions arrive, in one worker process per CPU."""

    def __init__(self, num_classes: int, foreground: Sequence[int] = ()):
        num_processes = len(workers.processor_cores())
        self._pool = futures.ProcessPoolExecutor(
            num_processes, multiprocessing.get_context("spawn"), initializer=_start_worker
        )
        # Limits the number of queued images, because memory cannot hold a large split's class maps.
        self._room = threading.Semaphore(8 * num_processes)
        self._pending: dict[futures.Future, int] = {}
        self._options = num_classes, tuple(foreground)
        # Start the processes now, because starting them takes as long as measuring many images.
        for _ in range(num_processes):
            self._submit(os.getpid)

    def submit(self, i: int, prediction: np.ndarray, label: np.ndarray) -> None:
        """Queues image i, given its maps; see `measure`. Blocks while the queue is full."""
        self._room.acquire()
        future = self._submit(measure, prediction, label, *self._options)
        future.add_done_callback(lambda _: self._room.release())
        self._pending[future] = i

    def _submit(self, function: Callable[..., Any], *args: Any) -> futures.Future:
        # Keep the workers from importing this process's main module, which imports JAX.
        main = sys.modules["__main__"]
        with mock.patch.multiple(main, create=True, __spec__=None, __file__=None):
            return self._pool.submit(function, *args)

    def results(self) -> dict[str, np.ndarray]:
        """Waits for all images. Returns the results of `measure` by name, stacked over images."""
        done = futures.as_completed(self._pending)
        bar = tqdm(done, "boundaries", len(self._pending), unit="image", leave=False, disable=None)
        measured = {self._pending[future]: future.result() for future in bar}
        return {
            name: np.stack([measured[i][name] for i in sorted(measured)]) for name in measured[0]
        }

    def close(self) -> None:
        """Shuts down the worker processes."""
        self._pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Makes a worker end with the evaluating process, and gives the worker the lowest priority.

    The network uses all cores. Workers with a higher priority would slow the network down.
    """
    # Only the evaluating process handles Ctrl-C. SIGTERM must still end this worker, because the
    # pool sends SIGTERM to all other workers when one dies.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    workers.end_with_parent()
    os.nice(19)
    cv2.setNumThreads(1)
