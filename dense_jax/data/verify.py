"""Opens every example of a source once, before hours are spent on it."""

import contextlib
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeVar

import tqdm

from dense_jax import storage
from dense_jax.data import Source
from dense_jax.data.files import some
from dense_jax.labels import IGNORE_LABEL

T = TypeVar("T")


def verify(source: Source, *, progress: bool = True) -> None:
    """Raises one ValueError that lists what is wrong with the examples of a source, or with all.

    A source found good is remembered by its fingerprint, in the user's cache folder, and passes
    at once the next time. Data that does not come from files has nothing to verify.
    """
    if source.fingerprint is None:
        return
    mark = storage.cache_folder() / "verified" / source.fingerprint
    if mark.exists():
        return
    labeled, errors = scan(source, _is_labeled, progress=progress)
    refuse(errors, len(source))
    if not any(labeled):
        raise ValueError(
            f"every pixel of all {len(source)} labels ({some(source.names)}) is ignored: nothing can "
            "be learnt from them or scored; see which values the dataset ignores"
        )
    with contextlib.suppress(OSError):  # a cache that cannot be written: verified again next time
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _is_labeled(example: dict[str, Any]) -> bool:
    return bool((example["label"] != IGNORE_LABEL).any())


def scan(
    source: Source, function: Callable[[dict[str, Any]], T], *, progress: bool = True
) -> tuple[list[T], list[str]]:
    """`function` of each good example, in order, and the messages of the bad ones.

    Reads in threads; the progress bar shows on a terminal only.
    """

    def read(i: int) -> T:
        if source.has_instances:
            source.instances(i)
        return function(source[i])

    return visit(read, len(source), "verifying", progress=progress)


def visit(
    function: Callable[[int], T], num_examples: int, description: str, *, progress: bool = True
) -> tuple[list[T], list[str]]:
    """`function` of each number below `num_examples`, in order, and the messages where it raised.

    Calls it in threads; the progress bar shows on a terminal only.
    """

    def attempt(i: int) -> tuple[list[T], list[str]]:
        try:
            return [function(i)], []
        except (ValueError, OSError) as error:
            return [], [str(error)]

    results, errors = [], []
    with futures.ThreadPoolExecutor() as pool:
        # The bar is off (True), or decides by itself whether this is a terminal (None).
        disable = None if progress else True
        visited = pool.map(attempt, range(num_examples))
        for result, error in tqdm.tqdm(
            visited, total=num_examples, desc=description, disable=disable
        ):
            results += result
            errors += error
    return results, errors


def refuse(errors: list[str], num_examples: int) -> None:
    """Raises ValueError with the first errors of a scan, if there are any."""
    if errors:
        listed = "\n  ".join(errors[:10])
        more = "\n  ..." if len(errors) > 10 else ""
        raise ValueError(f"{len(errors)} of {num_examples} examples are bad:\n  {listed}{more}")
