"""Regions: unions of classes, which may overlap, as what a network learns instead of the classes.

A network has one logit per region, whose sigmoid is the probability that a pixel is in the region.
Labels stay class ids. They become masks, uint8 [..., r], where they are compared with a network: 1
in a region, 0 outside, and IGNORE_LABEL at ignored pixels. Never uses jax.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8

from dense_jax.labels import IGNORE_LABEL

OUTSIDE = "(outside)"  # the name of pixels in no region, where a picture shows regions
MOST = IGNORE_LABEL - 1  # the number of regions that a picture can show


class Regions(NamedTuple):
    """The regions of a dataset.

    classes: The classes of each region, by their indices.
    thresholds: A pixel is predicted to be in a region if its probability is larger than the
      region's threshold. A tuple, or within a step an array [r].
    """

    names: tuple[str, ...]
    classes: tuple[tuple[int, ...], ...]
    num_classes: int
    thresholds: Any

    @property
    def table(self) -> UInt8[np.ndarray, "256 r"]:
        """Returns the masks of each label value."""
        table = np.full((IGNORE_LABEL + 1, len(self.names)), IGNORE_LABEL, np.uint8)
        for k, classes in enumerate(self.classes):
            table[: self.num_classes, k] = np.isin(np.arange(self.num_classes), classes)
        return table

    def inside(self, probabilities: Float[np.ndarray, "*d r"]) -> Bool[np.ndarray, "*d r"]:
        """Returns where a probability is larger than its region's threshold."""
        return probabilities > np.asarray(self.thresholds, np.float32)

    def masks(self, label: Integer[np.ndarray, "*d"]) -> UInt8[np.ndarray, "*d r"]:
        """Returns the masks of a label map."""
        return self.table[label]

    def pixels(self, counts: Integer[np.ndarray, "*d c"]) -> Integer[np.ndarray, "*d r"]:
        """Returns the number of pixels in each region, given those of each class."""
        return counts @ self.table[: self.num_classes].astype(np.int64)


def read(
    class_names: Sequence[str],
    declared: Any,
    thresholds: Mapping[str, float] | None = None,
) -> Regions | None:
    """Returns the regions declared as {name: class names}, or None if there are none.

    thresholds: {name: threshold}. If None, all are 0.5.

    Raises ValueError if a region is empty or has an unknown or a repeated class.
    """
    if declared is None:
        return None
    if not isinstance(declared, Mapping) or not 1 <= len(declared) <= MOST:
        raise ValueError(
            f'"regions" must hold the class names of 1 to {MOST} regions, '
            f'{{"NAME": ["CLASS", ...]}}, got {declared!r}'
        )
    for name, classes in declared.items():
        if not name.strip() or name == OUTSIDE:
            raise ValueError(f'"regions" cannot have the name {name!r}')
        is_list = isinstance(classes, Sequence) and not isinstance(classes, str)
        if not is_list or not classes or not all(isinstance(c, str) for c in classes):
            raise ValueError(f"region {name!r} must list the names of its classes, got {classes!r}")
        if unknown := [c for c in classes if c not in class_names]:
            raise ValueError(
                f"region {name!r} has no class {unknown[0]!r}; there are: {', '.join(class_names)}"
            )
        if len(set(classes)) < len(classes):
            raise ValueError(f"region {name!r} names a class more than once: {list(classes)}")
        if len(classes) == len(class_names):
            raise ValueError(f"region {name!r} has all classes, so every pixel is in it")
    members = tuple(tuple(map(list(class_names).index, names)) for names in declared.values())
    limits = tuple((thresholds or {}).get(name, 0.5) for name in declared)
    return Regions(tuple(declared), members, len(class_names), limits)


def declaration(source: Any) -> dict[str, list[str]] | None:
    """Returns the regions of a source as `read` takes them."""
    if (regions := source.regions) is None:
        return None
    return {
        name: [source.class_names[c] for c in classes]
        for name, classes in zip(regions.names, regions.classes, strict=True)
    }


def in_order(declared: Mapping[str, Any] | None) -> list[tuple[str, Any]] | None:
    """Returns a declaration with its order, which logits have, but which equal dicts may lack."""
    return None if declared is None else list(declared.items())


def flat(maps: Integer[np.ndarray, "..."], regions: Regions | None) -> Integer[np.ndarray, "h w"]:
    """Returns what a picture shows of labels or predicted classes [h, w], or of masks [h, w, r].

    With regions, this is the number of the last region, from 1, that has the pixel, and 0 in none.
    A region should therefore be declared after those that contain it.
    """
    if regions is None:
        return maps
    masks = regions.masks(maps) if maps.ndim == 2 else maps
    numbers = np.arange(1, masks.shape[-1] + 1, dtype=np.uint8)
    last = np.where(masks == 1, numbers, np.uint8(0)).max(axis=-1)
    return np.where(masks[..., 0] == IGNORE_LABEL, np.uint8(IGNORE_LABEL), last)
