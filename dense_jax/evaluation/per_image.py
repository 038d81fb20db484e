"""Scores that need whole class maps, measured image by image in worker processes. Never uses jax."""

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

PERIOD = 16  # pixels: a multiple of the period of every upsampling by a power of two up to this


def measure(
    prediction: np.ndarray, label: np.ndarray, num_classes: int, foreground: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """Returns the boundary metrics of two class maps [h, w], `trimap_iou` and `phase_errors`.

    With foreground classes, also the object metrics. Objects are the connected components of all
    foreground classes together.
    """
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
    """Counts wrong and valid pixels by (y mod PERIOD, x mod PERIOD): int64 [PERIOD, PERIOD, 2].

    Upsampling that treats pixels unequally by where they lie in a cell of its stride errs more at
    some phases than at others (Odena et al. 2016, "Deconvolution and checkerboard artifacts").
    Phases are the image's. They are the network's own where the image fits into one tile and is not
    resized.
    """
    valid = label != IGNORE_LABEL
    counts = np.stack([valid & (prediction != label), valid], axis=-1)
    rows, columns = (-length % PERIOD for length in label.shape)
    cells = np.pad(counts, ((0, rows), (0, columns), (0, 0)))
    cells = cells.reshape(-1, PERIOD, cells.shape[1] // PERIOD, PERIOD, 2)
    return cells.sum(axis=(0, 2), dtype=np.int64)


class Pool:
    """Measures images as their predictions come, in one process per processor."""

    def __init__(self, num_classes: int, foreground: Sequence[int] = ()):
        num_processes = len(os.sched_getaffinity(0))
        self._pool = futures.ProcessPoolExecutor(
            num_processes, multiprocessing.get_context("spawn"), initializer=_start_worker
        )
        # Bounds the class maps that wait: those of a large split do not fit into memory.
        self._room = threading.Semaphore(8 * num_processes)
        self._pending: dict[futures.Future, int] = {}
        self._options = num_classes, tuple(foreground)
        for _ in range(
            num_processes
        ):  # starts the processes now: that takes as long as many images
            self._submit(os.getpid)

    def submit(self, i: int, prediction: np.ndarray, label: np.ndarray) -> None:
        """Takes image i's class maps [h, w]; waits while too many are unfinished."""
        self._room.acquire()
        future = self._submit(measure, prediction, label, *self._options)
        future.add_done_callback(lambda _: self._room.release())
        self._pending[future] = i

    def _submit(self, function: Callable[..., Any], *args: Any) -> futures.Future:
        # Keeps the processes from importing this process's main module, and all of JAX with it.
        main = sys.modules["__main__"]
        with mock.patch.multiple(main, create=True, __spec__=None, __file__=None):
            return self._pool.submit(function, *args)

    def results(self) -> dict[str, np.ndarray]:
        """Waits for all images; returns the results of `measure`, stacked over images."""
        done = futures.as_completed(self._pending)
        bar = tqdm(done, "boundaries", len(self._pending), unit="image", leave=False, disable=None)
        measured = {self._pending[future]: future.result() for future in bar}
        return {
            name: np.stack([measured[i][name] for i in sorted(measured)]) for name in measured[0]
        }

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Prepares a process, which ends with the evaluating process, however that ends.

    Runs at idle priority: the network needs all cores at once, so any competing process would slow
    it down.
    """
    # A Ctrl-C is for the evaluating process alone. SIGTERM must still end this process: the pool
    # sends it once another process has died.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    workers.end_with_parent()
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    cv2.setNumThreads(1)
