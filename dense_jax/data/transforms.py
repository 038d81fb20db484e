"""Pure numpy transforms of one example on the host."""

from typing import Any

import numpy as np

from dense_jax.labels import IGNORE_LABEL

_OUTSIDE = {"image": 0, "label": IGNORE_LABEL, "border": 0}


def fit(
    example: dict[str, Any], canvas: tuple[int, int], rng: np.random.Generator
) -> dict[str, Any]:
    """Puts an example onto a canvas of fixed (height, width), at the top left.

    What is missing at the bottom and right becomes image 0, label IGNORE_LABEL and, where there
    is one, border 0; an axis that is too long is cut to a window drawn from `rng`. The label becomes
    uint8. Adds `size`: the int32 height and width, in pixels, that hold the example.
    """
    window, size = [], []
    for length, room in zip(example["label"].shape, canvas, strict=True):
        start = int(rng.integers(length - room + 1)) if length > room else 0
        size.append(min(length, room))
        window.append(slice(start, start + size[-1]))
    fitted = dict(example, size=np.array(size, np.int32))
    for name in _OUTSIDE.keys() & example:
        array = example[name][tuple(window)]
        if name == "label":
            array = array.astype(np.uint8, copy=False)
        if tuple(size) == canvas:  # nothing to add, so nothing to copy
            fitted[name] = array
        else:
            fitted[name] = np.full((*canvas, *array.shape[2:]), _OUTSIDE[name], array.dtype)
            fitted[name][: size[0], : size[1]] = array
    return fitted
