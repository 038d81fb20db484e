"""One step late: the host handles a result while the device computes the next one."""

from collections.abc import Callable
from typing import Any


class OneStepLate:
    """Calls `handle(*result)` for each result, in order, after the next one was dispatched.

    JAX dispatches a computation and returns at once; reading its result waits for it. A host that
    reads each result before it dispatches the next leaves the device idle meanwhile.
    """

    def __init__(self, handle: Callable[..., None]):
        self._handle = handle
        self._pending: tuple[Any, ...] | None = None

    def put(self, *result: Any) -> None:
        """Takes a dispatched result, and handles the one before it."""
        previous, self._pending = self._pending, result
        if previous is not None:
            self._handle(*previous)

    def flush(self) -> None:
        """Handles the result that is still pending, if there is one."""
        previous, self._pending = self._pending, None
        if previous is not None:
            self._handle(*previous)
