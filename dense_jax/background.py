"""Threads that read ahead and write behind, each thing in its order, with bounded memory."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self, TypeVar

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


class Lanes:
    """Threads for calls: those of one lane run one after the other, in order."""

    def __init__(self, num_lanes: int):
        self._pools = [ThreadPoolExecutor(1) for _ in range(num_lanes)]
        self._pending: deque[Future] = deque()

    def submit(self, lane: int, call: Callable, *args: object) -> None:
        """Waits while too much waits already. What an earlier call raised is raised here."""
        self._pending.append(self._pools[lane % len(self._pools)].submit(call, *args))
        if len(self._pending) > 2 * len(self._pools):
            self._pending.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=error is not None)
        if error is None:
            for each in self._pending:
                each.result()
