"""Scores that need whole class maps, measured image by image in worker processes. Never uses jax."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from concurrent import futures
from typing import Any
from unittest import mock

import numpy as np
from tqdm import tqdm

from dense_jax import boundary, objects
from dense_jax.data import Source
from dense_jax.labels import IGNORE_LABEL


def measure(
    prediction: np.ndarray, label: np.ndarray, num_classes: int, foreground: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """Of class maps [h, w]: what `boundary.statistics` returns and, with foreground classes, the
    Rand and information scores of their connected components, [].
    """
    measured = boundary.statistics(prediction, label, num_classes)
    if foreground:
        truth = objects.components(np.isin(label, foreground))
        guess = objects.components(np.isin(prediction, foreground) & (label != IGNORE_LABEL))
        for score in (objects.rand_score, objects.information_score):
            measured[score.__name__] = np.array(score(guess, truth))
    return measured


class Pool:
    """Measures the predictions of a source's images as they come, one process per processor."""

    def __init__(self, source: Source, foreground: Sequence[int] = ()):
        num_processes = len(os.sched_getaffinity(0))
        self._pool = futures.ProcessPoolExecutor(
            num_processes,
            multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(source, tuple(foreground)),
        )
        self._room = threading.Semaphore(8 * num_processes)  # a large split does not fit in memory
        self._pending: list[futures.Future] = []

    def submit(self, i: int, prediction: np.ndarray) -> None:
        """Takes image i's predicted classes, [h, w]; waits while too many are unfinished."""
        self._room.acquire()
        # The processes are not to import this one's main module, and all of JAX with it.
        with mock.patch.dict(vars(sys.modules["__main__"]), __spec__=None, __file__=None):
            future = self._pool.submit(_measure, i, prediction)
        future.add_done_callback(lambda _: self._room.release())
        self._pending.append(future)

    def results(self) -> dict[str, np.ndarray]:
        """Waits for all; what `measure` returned, stacked over images."""
        done = futures.as_completed(self._pending)
        bar = tqdm(done, "boundaries", len(self._pending), unit="image", leave=False, disable=None)
        measured = dict(future.result() for future in bar)
        return {
            name: np.stack([measured[i][name] for i in range(len(measured))])
            for name in measured[0]
        }

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown(cancel_futures=True)


_SOURCE: Any = None  # in a worker process: the images, and the classes of the foreground


def _start(source: Source, foreground: tuple[int, ...]) -> None:
    global _SOURCE
    _SOURCE = source, foreground


def _measure(i: int, prediction: np.ndarray) -> tuple[int, dict[str, np.ndarray]]:
    source, foreground = _SOURCE
    return i, measure(prediction, source[i]["label"], source.num_classes, foreground)
