"""Adds per-pixel targets to examples. A target is an additional array [h, w, ...] in each example.

To add a target, wrap a source in `WithTarget(source, Field(name), function)`. All later stages,
from the cache to augmentation, handle every field in `source.fields`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float16, Float32, Integer

from dense_jax.data.source import Examples, Field, Source, Wrapper
from dense_jax.labels import IGNORE_LABEL, Objects, components
from dense_jax.regions import Regions

BORDER = Field("border")


def distances_field(num_classes: int) -> Field:
    """Returns the field of `signed_distances`, which takes 2 bytes per pixel and class."""
    return Field("distances", "float16", shape=(num_classes,))


def distance_to(mask: Bool[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """Returns the distance from each pixel to the nearest pixel of a mask that has one, in pixels."""
    outside = (~mask).astype(np.uint8)
    distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # The last bits of `distance` vary with memory addresses, but its squares are integers.
    return np.sqrt(np.rint(distance * distance))


def signed_distances(
    label: Integer[np.ndarray, "h w"], num_classes: int
) -> Float16[np.ndarray, "h w {num_classes}"]:
    """Returns the signed distance of each pixel to the boundary of each class, in pixels.

    Outside a class, this is the distance to the nearest pixel of the class. Inside, it is 1 minus
    the distance to the nearest pixel of another class, so that it is 0 at the class's outermost
    pixels. This is the convention of the authors' code of Kervadec et al. 2019, "Boundary loss"
    (arXiv 1812.07032). Ignored pixels belong to no class, so they make no boundary. The distance to
    a class is 0 everywhere if the label lacks the class, or has no other.
    """
    distances = np.zeros((*label.shape, num_classes), np.float16)
    valid = label != IGNORE_LABEL
    for k in np.unique(label[valid]):
        inside = label == k
        others = valid & ~inside
        if others.any():
            distances[..., k] = np.where(inside, 1 - distance_to(others), distance_to(inside))
    return distances


def border_weights(objects: Objects, weight: float, sigma: float) -> Float32[np.ndarray, "h w"]:
    """Returns a map of extra loss weights, which are high in the background between close objects.

    The value at a pixel is weight * exp(-(d1 + d2)^2 / (2 sigma^2)), where d1 and d2 are the
    distances to the nearest and the second-nearest object. Distances and sigma are in pixels. This
    is equation 2 in section 3 of Ronneberger et al. 2015, "U-Net", without the term w_c. Unlike in
    the paper, the value is 0 inside objects because the weights are for the background between
    them. Values at d1 + d2 > 6 sigma become 0.
    """
    from scipy import ndimage  # slow to import, and few runs have border weights

    reach = 6 * sigma
    margin = math.ceil(reach)
    nearest, second = np.full((2, *objects.shape), np.inf, np.float32)
    for k, box in enumerate(ndimage.find_objects(objects), start=1):
        if box is None:  # no pixel has object number k
            continue
        # Beyond `reach`, an object has no influence, so distances are computed only around it.
        around = tuple(slice(max(0, side.start - margin), side.stop + margin) for side in box)
        distance = distance_to(objects[around] == k)
        d1, d2 = nearest[around], second[around]
        np.minimum(d2, np.maximum(d1, distance), out=d2)
        np.minimum(d1, distance, out=d1)
    total = nearest + second
    counts = (objects == 0) & (total <= reach)
    return np.where(counts, weight * np.exp(-(total**2) / (2 * sigma**2)), 0).astype(np.float32)


class WithTarget(Wrapper):
    """A source with an additional per-pixel array in each example.

    function(i, example) returns the array [h, w, ...] for example i. Worker processes need a picklable
    function, such as a module-level function or a `functools.partial` of one.
    """

    def __init__(self, source: Examples, field: Field, function: Callable[..., np.ndarray]):
        super().__init__(source)
        self.fields = (*source.fields, field)
        self._name = field.name
        self._function = function

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = self._source[i]
        return example | {self._name: self._function(i, example)}


def with_distances(
    source: Examples, num_classes: int, regions: Regions | None = None
) -> WithTarget:
    """Returns the source with `signed_distances` added to each example as the field `distances`.

    regions: If not None, the distances are those to the boundaries of the regions.
    """
    function = functools.partial(_distances, num_classes, regions)
    field = distances_field(len(regions.names) if regions else num_classes)
    return WithTarget(source, field, function)


def _distances(
    num_classes: int, regions: Regions | None, i: int, example: dict[str, Any]
) -> Float16[np.ndarray, "h w _"]:
    if regions is None:
        return signed_distances(example["label"], num_classes)
    masks = np.moveaxis(regions.masks(example["label"]), -1, 0)
    return np.stack([signed_distances(mask, 2)[..., 1] for mask in masks], axis=-1)


def with_border_weights(
    source: Source, *, weight: float, sigma: float, classes: Sequence[str] | None
) -> WithTarget:
    """Returns the source with `border_weights` added to each example as the field BORDER.

    classes: The names of the classes whose connected components are the objects. If None, the
      objects are the source's instances.

    Raises ValueError if a class name is unknown, or if there are neither classes nor instances.
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
