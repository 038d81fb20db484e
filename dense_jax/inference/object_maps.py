"""Finds the objects in predicted class maps, and measures and counts them. Never imports jax.

An object is a 4-connected component of the pixels of one class, as in evaluation
(`labels.components`). A network may also predict a class for the borders between objects. Pixels of
this class separate objects, and are then given to the nearest one.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float16, UInt8, UInt16
from scipy import ndimage

from dense_jax import storage
from dense_jax.inference.stitching import Strip
from dense_jax.labels import Objects, components
from dense_jax.spelling import suggestion

MOST = 2**16 - 1  # the number of objects that a 16-bit map can hold
# The columns of objects.csv. Areas are in pixels, and positions in pixels from the top left corner.
# The object lies in image[top:bottom, left:right].
COLUMNS = (
    *("image", "object", "class", "area", "centroid_y", "centroid_x"),
    *("top", "left", "bottom", "right", "mean_probability"),
)


class Kinds(NamedTuple):
    """The classes whose components are objects, and the class of borders between them."""

    classes: dict[int, str]  # their names
    border: int | None


def kinds(class_names: Sequence[str], wanted: Sequence[str], border_class: str | None) -> Kinds:
    """Returns the classes of objects by name. Raises ValueError if there is no such class.

    wanted: The names of the classes. ["all"] means all classes but class 0 and `border_class`.
    """
    if border_class and not wanted:
        raise ValueError("--border_class separates objects: pass --objects, too")
    if list(wanted) == ["all"]:
        wanted = [name for name in class_names[1:] if name != border_class]
    for name in [*wanted, *([border_class] if border_class else [])]:
        if name not in class_names:
            near = suggestion(name, class_names)
            raise ValueError(f"no class {name!r}; there are: {', '.join(class_names)}{near}")
    if border_class in wanted:
        raise ValueError(f"{border_class!r} cannot be in both --objects and --border_class")
    border = class_names.index(border_class) if border_class else None
    return Kinds({c: name for c, name in enumerate(class_names) if name in wanted}, border)


def number(classes: UInt8[np.ndarray, "h w"], kinds: Kinds) -> UInt16[np.ndarray, "h w"]:
    """Returns the number of each pixel's object, from 1, and 0 outside all objects.

    Raises ValueError if there are more than `MOST` objects.
    """
    objects = components(classes, kinds.classes)
    if objects.max() > MOST:
        raise ValueError(
            f"has {objects.max()} objects, but a 16-bit image holds at most {MOST} numbers: name "
            "fewer classes with --objects"
        )
    if kinds.border is not None:
        _share(objects, classes == kinds.border)
    return objects.astype(np.uint16)


def _share(objects: Objects, border: Bool[np.ndarray, "h w"]) -> None:
    """Gives each border pixel to the nearest object (Euclidean distance), in place.

    A connected part of the border that touches no object stays outside all objects.
    """
    count, parts = cv2.connectedComponents(border.astype(np.uint8), connectivity=4)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    beside = cv2.dilate((objects > 0).astype(np.uint8), cross) > 0
    touches = np.zeros(count, bool)
    touches[parts[beside & border]] = True
    given = touches[parts] & border
    if given.any():
        y, x = np.asarray(
            ndimage.distance_transform_edt(
                objects == 0, return_distances=False, return_indices=True
            )
        )
        objects[given] = objects[y[given], x[given]]


def measure(
    objects: UInt16[np.ndarray, "h w"],
    classes: UInt8[np.ndarray, "h w"],
    confidence: Float16[np.ndarray, "h w"],
    kinds: Kinds,
) -> Iterator[tuple]:
    """Yields the values of COLUMNS for each object, except the image.

    confidence: The probability of the predicted class. Its mean for an object excludes the border
      pixels that the object was given, because another class was predicted there.
    """
    for k, box in enumerate(ndimage.find_objects(objects), 1):
        inside = objects[box] == k
        own = inside & (classes[box] != kinds.border) if kinds.border is not None else inside
        (top, bottom), (left, right) = ((side.start, side.stop) for side in box)
        rows, columns = inside.sum(axis=1), inside.sum(axis=0)
        area = rows.sum()
        y, x = rows @ np.arange(top, bottom) / area, columns @ np.arange(left, right) / area
        probability = confidence[box][own].mean(dtype=np.float64)
        name = kinds.classes[int(classes[box].flat[own.argmax()])]
        position = f"{y:.2f}", f"{x:.2f}", top, left, bottom, right
        yield (k, name, int(area), *position, f"{probability:.4f}")


class ObjectsOfImage:
    """Finds the objects of one image, whose strips are added from top to bottom.

    Holds the class and confidence of all pixels until the last strip is added. Finding the objects
    then takes about 20 bytes per pixel for a moment.
    """

    def __init__(self, height: int, kinds: Kinds):
        self._height, self._kinds = height, kinds
        self._strips: list[Strip] = []
        self.rows: list[tuple] = []  # the measurements, once the last strip is added

    def add(self, strip: Strip) -> Iterator[UInt16[np.ndarray, "h w"]]:
        """Adds the maps "classes" and "confidence". Yields the map of objects after the last strip."""
        maps = {name: strip.maps[name] for name in ("classes", "confidence")}
        self._strips.append(strip._replace(maps=maps))
        if strip.stop == self._height:
            classes, confidence = (
                np.concatenate([strip.maps[name] for strip in self._strips]) for name in maps
            )
            self._strips.clear()
            objects = number(classes, self._kinds)
            self.rows = list(measure(objects, classes, confidence, self._kinds))
            yield objects


def write_tables(
    tables: Mapping[str, Sequence[tuple]], names: Iterable[str], objects: Path, counts: Path
) -> None:
    """Writes the objects of all images, and the number of objects of each class in each image.

    tables: The rows of each image, by its name. names: The names of the classes of objects.
    """
    names = list(names)
    lines = [(image, *row) for image, rows in tables.items() for row in rows]
    numbers = []
    for image, rows in tables.items():
        found = [row[1] for row in rows]
        numbers.append((image, *(found.count(name) for name in names)))
    for path, head, body in ((objects, COLUMNS, lines), (counts, ("image", *names), numbers)):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([head, *body])
        storage.write_text(path, text.getvalue())


def summarize(counts: Path) -> str:
    """Returns a line for each class of the table that `write_tables` wrote as `counts`."""
    with counts.open(newline="") as file:
        (_, *names), *lines = csv.reader(file)
    columns = zip(*(map(int, line[1:]) for line in lines), strict=True)
    return "\n".join(
        f"{name}: {sum(column)} objects in {len(column)} images, {min(column)} to {max(column)} each"
        for name, column in zip(names, columns, strict=False)
    )
