"""Per-pixel targets: arrays [h, w] that a source's examples hold beside image and label.

A target is a function of an example and one line: `WithTarget(source, Field(name), function)`. Every
stage that handles examples, from the cache to augmentation, loops over `source.fields`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, Int32
from scipy import ndimage

from dense_jax.data.source import Examples, Field, Source
from dense_jax.labels import IGNORE_LABEL, Objects, components

BORDER = Field("border")


def border_weights(objects: Objects, weight: float, sigma: float) -> Float32[np.ndarray, "h w"]:
    """Returns the extra weight of background pixels between two close objects.

    weight * exp(-(d1 + d2)^2 / (2 sigma^2)), with a pixel's distances d1 and d2 to the nearest and
    the second nearest object; they and sigma are in pixels (Ronneberger et al. 2015, "U-Net",
    section 3, formula 2, without its w_c). The formula does not vanish inside objects. Here it does:
    the network has to learn the background that separates them. It is also 0 where
    d1 + d2 > 6 sigma, where it would be less than 1.6e-8 weight.
    """
    reach = 6 * sigma
    margin = math.ceil(reach)
    nearest, second = np.full((2, *objects.shape), np.inf, np.float32)
    for k, box in enumerate(ndimage.find_objects(objects), start=1):
        if box is None:  # an object number that is not used
            continue
        # Farther away than `reach`, an object changes nothing, so only its surroundings are computed.
        around = tuple(slice(max(0, side.start - margin), side.stop + margin) for side in box)
        outside = (objects[around] != k).astype(np.uint8)
        distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        # Its last bits depend on the array's address, but squared distances are whole numbers.
        distance = np.sqrt(np.rint(distance * distance))
        d1, d2 = nearest[around], second[around]
        np.minimum(d2, np.maximum(d1, distance), out=d2)
        np.minimum(d1, distance, out=d1)
    total = nearest + second
    counts = (objects == 0) & (total <= reach)
    return np.where(counts, weight * np.exp(-(total**2) / (2 * sigma**2)), 0).astype(np.float32)


class WithTarget(Examples):
    """Examples that hold one more per-pixel array.

    function(i, example) returns the array [h, w] of example i. Worker processes get a copy of it, so
    it must be a function of a module, or a `functools.partial` of one.
    """

    def __init__(self, source: Examples, field: Field, function: Callable[..., np.ndarray]):
        self.num_channels = source.num_channels
        self.fields = (*source.fields, field)
        self._source = source
        self._name = field.name
        self._function = function

    @property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        return self._source.sizes

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = self._source[i]
        return example | {self._name: self._function(i, example)}


def with_border_weights(
    source: Source, *, weight: float, sigma: float, classes: Sequence[str] | None
) -> WithTarget:
    """Adds the field BORDER: see `border_weights`.

    classes: names of the classes whose connected components are the objects. None: the objects are
      the source's own instances. Raises ValueError if there are no instances, or no such class.
    """
    names = ", ".join(source.class_names)
    if not classes and not source.has_instances:
        raise ValueError(
            "border.classes is not set and the dataset has no instance files: name the classes "
            f"whose connected components are the objects, of {names}"
        )
    if unknown := set(classes or ()) - set(source.class_names):
        raise ValueError(f"border.classes: no class {', '.join(unknown)}; there are: {names}")
    numbers = [source.class_names.index(name) for name in classes or ()]
    function = functools.partial(_border, source, numbers, weight, sigma)
    return WithTarget(source, BORDER, function)


def _border(
    source: Source, classes: list[int], weight: float, sigma: float, i: int, example: dict[str, Any]
) -> Float32[np.ndarray, "h w"]:
    if classes:
        objects = components(example["label"], classes)
    else:
        objects = np.where(example["label"] == IGNORE_LABEL, 0, source.instances(i))
    return border_weights(objects, weight, sigma)
