"""Threads that read ahead and write behind, each in order, with bounded memory."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """Yields the same items, made by a thread that is up to `count` of them ahead."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, items, end) for _ in range(count))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(pool.submit(next, items, end))
                yield item  # pyrefly: ignore
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def lanes(count: int) -> Generator[Callable[..., Future]]:
    """Gives submit(lane, call, *args), which runs the calls of a lane in order, in a thread.

    It waits while more than 2 * count calls are pending. An error of a call is raised by a later
    submit or at the end, which waits for all calls. After an error, calls that are pending do not run.
    """
    pools = [ThreadPoolExecutor(1) for _ in range(count)]
    pending: deque[Future] = deque()

    def submit(lane: int, call: Callable, *args: object) -> Future:
        pending.append(submitted := pools[lane % count].submit(call, *args))
        if len(pending) > 2 * count:
            pending.popleft().result()
        return submitted

    try:
        yield submit
        for future in pending:
            future.result()
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
