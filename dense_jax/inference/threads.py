"""Runs iterators and function calls in threads, in order and with bounded memory."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """Yields the items in order, while a thread computes up to `count` items ahead."""
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
    """Yields a function submit(lane, call, *args) that runs call(*args) in one of `count` threads.

    Calls with equal `lane` run in order, in thread lane % count. `submit` blocks while more than
    2 * count calls are pending. The end of the `with` block waits for all calls. If a call fails, a
    later `submit` or the end of the block raises the error. Calls that have not started are then
    canceled.
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
