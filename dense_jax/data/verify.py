"""Opens every example of a source once, to find bad examples before a long run."""

import contextlib
import logging
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeVar

import numpy as np
import tqdm

from dense_jax import storage
from dense_jax.data.source import Source
from dense_jax.labels import IGNORE_LABEL
from dense_jax.spelling import some

_LOG = logging.getLogger("dense_jax")
T = TypeVar("T")


def verify(source: Source) -> list[str]:
    """Opens every example of a source. Returns the names of the classes that the labels contain.

    Sources that are not read from files are not verified, and are taken to have all classes.

    Raises ValueError if any example is invalid or if every pixel of every example is ignored.
    """
    if source.fingerprint is None:
        return list(source.class_names)

    def shown() -> np.ndarray:
        values = scan(source, lambda example: set(np.unique(example["label"]).tolist()))
        return np.array(sorted(set().union(*values) - {IGNORE_LABEL}), int)

    present = cached(source, "verified", shown)
    if not present.size:
        raise ValueError(
            f"every pixel of all {len(source)} labels ({some(source.names)}) is ignored: nothing can "
            "be learned from them or scored; check which values the dataset ignores"
        )
    return [source.class_names[k] for k in present]


def cached(source: Source, kind: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns compute(), a fact of the data. If the data comes from files, computes it only once.

    The array is kept in the folder `kind` of the user's cache folder.
    """
    if source.fingerprint is None:
        return compute()
    path = storage.cache_folder() / kind / f"{source.fingerprint}.npy"
    with contextlib.suppress(OSError, ValueError):
        return np.load(path)
    array = compute()
    with contextlib.suppress(OSError), storage.atomic(path) as file:  # caching is optional
        np.save(file, array)
    return array


def scan(source: Source, function: Callable[[dict[str, Any]], T]) -> list[T]:
    """Returns function(example) for each example. Raises ValueError if any example is invalid."""
    results, errors = examine(source, function)
    refuse(errors, len(source))
    return results


def examine(source: Source, function: Callable[[dict[str, Any]], T]) -> tuple[list[T], list[str]]:
    """Calls function(example) for each example. Returns (results, errors) like `visit`."""

    def read(i: int) -> T:
        if source.has_instances:
            source.instances(i)
        return function(source[i])

    return visit(read, len(source), "reading and checking")


def visit(
    function: Callable[[int], T], num_examples: int, description: str
) -> tuple[list[T], list[str]]:
    """Calls function(i) for each i < `num_examples` in threads. Returns (results, errors).

    A call that raises ValueError or OSError adds an error message instead of a result. The lists
    `results` and `errors` are in the order of i. Logs what it does, and shows a progress bar if run
    in a terminal.
    """
    _LOG.info("%s %d images", description, num_examples)

    def attempt(i: int) -> tuple[list[T], list[str]]:
        try:
            return [function(i)], []
        except (ValueError, OSError) as error:
            return [], [str(error)]

    results, errors = [], []
    with (
        futures.ThreadPoolExecutor() as pool,
        tqdm.tqdm(total=num_examples, unit="image", leave=False, disable=None) as bar,
    ):
        for result, error in pool.map(attempt, range(num_examples)):
            results += result
            errors += error
            bar.update()
    return results, errors


def refuse(errors: list[str], num_examples: int) -> None:
    """Raises ValueError with the first ten error messages if `errors` is not empty."""
    if errors:
        listed = "\n  ".join(errors[:10])
        more = "\n  ..." if len(errors) > 10 else ""
        raise ValueError(f"{len(errors)} of {num_examples} examples are bad:\n  {listed}{more}")
