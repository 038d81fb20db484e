"""The border weights of the U-Net paper: what a pixel between two close objects weighs more.

Objects are int32 [h, w], 0 = none and k = object k: instances as labeled, or the connected
components of some classes. Ignored pixels belong to none.
"""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32
from scipy import ndimage

from dense_jax.data import Field, Source, has_instances
from dense_jax.labels import IGNORE_LABEL, Objects, components


def border_weights(objects: Objects, weight: float, sigma: float) -> Float32[np.ndarray, "h w"]:
    """weight * exp(-(d1 + d2)^2 / (2 sigma^2)) between objects, 0 inside them.

    d1 and d2 are a pixel's distances to the nearest and the second nearest object; they and sigma
    are in pixels (Ronneberger et al. 2015, "U-Net", section 3, formula 2, without its w_c). The
    formula itself does not vanish inside objects; here it weighs only the background, which is what
    must be learnt to separate them. 0 where d1 + d2 > 6 sigma: the term is below 1.6e-8 weight.
    """
    reach = 6 * sigma
    margin = math.ceil(reach)
    nearest, second = np.full((2, *objects.shape), np.inf, np.float32)
    for k, box in enumerate(ndimage.find_objects(objects), start=1):
        if box is None:  # numbers may be left out
            continue
        # Beyond its surroundings an object does not matter, however many there are.
        around = tuple(slice(max(0, side.start - margin), side.stop + margin) for side in box)
        outside = (objects[around] != k).astype(np.uint8)
        distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        # Its last bits depend on where in memory it lies, but squared distances are whole numbers.
        distance = np.sqrt(np.rint(distance * distance))
        d1, d2 = nearest[around], second[around]
        np.minimum(d2, np.maximum(d1, distance), out=d2)
        np.minimum(d1, distance, out=d1)
    total = nearest + second
    counts = (objects == 0) & (total <= reach)
    return np.where(counts, weight * np.exp(-(total**2) / (2 * sigma**2)), 0).astype(np.float32)


class Bordered:
    """A source whose examples also have `border`, float32 [h, w]: `border_weights` of theirs.

    classes: names of those whose connected components are the objects; None: the source's own
      instances. Raises ValueError if there are none, or no such class.
    """

    fields = (Field("border"),)

    def __init__(self, source: Source, weight: float, sigma: float, classes: Sequence[str] | None):
        there = ", ".join(source.class_names)
        if not classes and not has_instances(source):
            raise ValueError(
                "border.classes is not set and the dataset has no instance files: name the classes "
                f"whose connected components are the objects, of {there}"
            )
        if unknown := set(classes or ()) - set(source.class_names):
            raise ValueError(f"border.classes: no class {', '.join(unknown)}; there are: {there}")
        self.sizes = source.sizes
        self.num_channels = source.num_channels
        self._source: Any = source
        self._weight = weight
        self._sigma = sigma
        self._classes = classes

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = self._source[i]
        label = example["label"]
        if self._classes:
            classes = [self._source.class_names.index(name) for name in self._classes]
            objects = components(label, classes)
        else:
            objects = np.where(label == IGNORE_LABEL, 0, self._source.instances(i))
        return dict(example, border=border_weights(objects, self._weight, self._sigma))
