"""Positions on an axis of an image, in pixels.

Ground: any room may use it. Never uses jax.
"""

import operator
from collections.abc import Callable
from typing import Any


def reflect(positions: Any, length: Any, modulo: Callable[[Any, Any], Any] = operator.mod) -> Any:
    """Reflects positions into [0, length - 1], about the centers of the outermost pixels.

    This is what mode="reflect" of numpy.pad does, however far outside the positions are. It uses
    operators only, so that both arguments may be numpy or JAX arrays, and lengths symbolic sizes.

    modulo: a faster way to compute positions % period, where there is one.
    """
    last = length - 1
    period = 2 * last + 1 // length  # an axis of 1 pixel has the period 1, not 0
    return last - abs(modulo(positions, period) - last)
