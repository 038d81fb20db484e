"""Conventions for labels: the value of ignored pixels, and objects as connected components.

Base module: any other module may import it. Never uses jax.
"""

from collections.abc import Iterable

import cv2
import numpy as np
from jaxtyping import Integer

# Every loss, metric and pipeline ignores pixels of this value. Labels are uint8 on disk and on the
# way to the device, so 255 is also the largest label, and a dataset has at most 255 classes.
IGNORE_LABEL = 255

Objects = Integer[np.ndarray, "h w"]  # the number of each pixel's object, 0 outside all objects


def components(label: Integer[np.ndarray, "h w"], classes: Iterable[int]) -> Objects:
    """Returns an int32 map of the 4-connected components of the given classes, numbered from 1."""
    objects = np.zeros(label.shape, np.int32)
    for k in classes:
        _, numbers = cv2.connectedComponents((label == k).astype(np.uint8), connectivity=4)
        objects += np.where(numbers > 0, numbers + objects.max(), 0)
    return objects
