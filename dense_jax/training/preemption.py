"""Interrupts: how a signal asks the training of all processes to save and stop."""

import signal

import jax
from jax.experimental import multihost_utils


class Interrupts:
    """A context in which SIGTERM (preemption) and Ctrl-C ask to save and stop; a second one kills.

    With several processes JAX has a SIGTERM handler of its own, which tells all of them; Ctrl-C is
    passed on to it.
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
        """Returns whether to stop after this step; the answer is the same on every host."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received
