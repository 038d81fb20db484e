"""Threads that read ahead and write behind, each thing in its order, with bounded memory."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items, made by a thread that is up to `count` of them ahead."""
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
def lanes(count: int) -> Iterator[Callable[..., Future]]:
    """Gives submit(lane, call, *args): calls of one lane run one after the other, in order.

    It waits while too much waits already. What a call raised is raised by a later one, or at the
    end, which comes when all are done; after an error, those that wait are not begun.
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
        for each in pending:
            each.result()
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
