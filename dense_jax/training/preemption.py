"""Lets SIGTERM or Ctrl-C stop the training on all processes, after saving."""

import signal

import jax
from jax.experimental import multihost_utils


class Interrupts:
    """A context manager that records SIGTERM (preemption) or Ctrl-C as a request to stop.

    A second signal kills the process. With several processes, Ctrl-C is converted to SIGTERM,
    because JAX's SIGTERM handler notifies all processes.
    """

    def __enter__(self):
        self._received = False
        numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
        self._handlers = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, frame) -> None:
        self._received = True
        signal.signal(number, self._handlers[number])
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Returns whether to save and stop after `step`. All hosts get the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received
