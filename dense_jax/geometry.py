"""Positions along an axis of an image, in pixels.

Base module: any other module may import it. Never imports jax.
"""

import operator
from collections.abc import Callable
from typing import Any


def reflect(positions: Any, length: Any, modulo: Callable[[Any, Any], Any] = operator.mod) -> Any:
    """Reflects positions into [0, length - 1] about the centers of the border pixels.

    Equivalent to numpy.pad(mode="reflect") for positions at any distance outside the image. The
    arguments may be numbers, NumPy arrays or JAX arrays, and `length` may be symbolic.

    modulo: A replacement for the operator %, for speed.
    """
    last = length - 1
    period = 2 * last + 1 // length  # an axis of 1 pixel has period 1, not 0
    return last - abs(modulo(positions, period) - last)
