"""Lets the host handle a result while the device computes the next one."""

from collections.abc import Callable
from typing import Any


class OneStepLate:
    """Calls `handle(*result)` for each result, in order, once the next result has been dispatched.

    JAX returns as soon as a computation is dispatched, but reading the result waits for the device.
    A host that reads each result before dispatching the next leaves the device idle in between.
    """

    def __init__(self, handle: Callable[..., None]):
        self._handle = handle
        self._pending: tuple[Any, ...] | None = None

    def put(self, *result: Any) -> None:
        """Stores a dispatched result and handles the previous one."""
        previous, self._pending = self._pending, result
        if previous is not None:
            self._handle(*previous)

    def flush(self) -> None:
        """Handles the pending result, if there is one."""
        previous, self._pending = self._pending, None
        if previous is not None:
            self._handle(*previous)
