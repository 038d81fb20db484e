"""Pure numpy transforms of one example on the host."""

from typing import Any

import numpy as np

from dense_jax.labels import IGNORE_LABEL


def fit(
    example: dict[str, Any], canvas: tuple[int, int], rng: np.random.Generator
) -> dict[str, Any]:
    """Puts an example onto a canvas of fixed (height, width), at the top left.

    What is missing at the bottom and right becomes image 0 and label IGNORE_LABEL; an axis that
    is too long is cut to a window drawn from `rng`. Adds `size`: the int32 height and width, in
    pixels, that hold the example.
    """
    image, label = example["image"], example["label"]
    window, size = [], []
    for length, room in zip(label.shape, canvas, strict=True):
        start = int(rng.integers(length - room + 1)) if length > room else 0
        size.append(min(length, room))
        window.append(slice(start, start + size[-1]))
    fitted_image = np.zeros((*canvas, image.shape[-1]), image.dtype)
    fitted_label = np.full(canvas, IGNORE_LABEL, label.dtype)
    fitted_image[: size[0], : size[1]] = image[tuple(window)]
    fitted_label[: size[0], : size[1]] = label[tuple(window)]
    return dict(example, image=fitted_image, label=fitted_label, size=np.array(size, np.int32))
