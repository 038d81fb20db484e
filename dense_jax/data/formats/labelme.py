"""labelme: a JSON file of shapes beside each image, or with the image in it.

Later shapes lie on top. Shapes with the same label and group_id are one object. `_background_`
is the background, so a shape of it makes a hole, and `__ignore__` is ignored.
"""

import base64
import functools
import hashlib
import io
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

from dense_jax.data import files
from dense_jax.data.formats import export
from dense_jax.data.formats.export import BACKGROUND, Export, Item, Layer, Shape

_LINE_WIDTH, _POINT_SIZE = 10, 5  # pixels, labelme's own


def read(annotations: str) -> Export:
    """Reads a folder of JSON files, or those of a pattern. Images without one are left out."""
    items: list[Item] = []
    names: set[str] = set()
    for holes, path in export.find(export.named(annotations, ".json")):
        table = files.read_json(path, "")
        try:
            names |= {_class(shape) for shape in table["shapes"]}
            image = path.parent / pathlib.PureWindowsPath(table["imagePath"]).as_posix()
            encoded = table["imageData"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not as labelme's format has it: {error!r}") from error
        embedded = None
        if encoded and not image.is_file():
            image = path.with_suffix(".png" if encoded.startswith("iVBORw0KGgo") else ".jpg")
            embedded = functools.partial(_embedded, path)
        text = hashlib.sha256(path.read_bytes()).hexdigest()
        layers = functools.partial(_layers, path)
        items.append(
            Item(holes.get("SPLIT"), holes["NAME"], image, layers, (path,), text, embedded)
        )
    order = "the later shape in the file lies on top"
    return Export(items, export.with_background(sorted(names)), order)


def _embedded(path: pathlib.Path) -> bytes:
    return base64.b64decode(json.loads(path.read_bytes())["imageData"])


def _class(shape: dict[str, Any]) -> str:
    return BACKGROUND if shape["label"] == "_background_" else shape["label"]


def _layers(path: pathlib.Path, size: Shape) -> Iterator[Layer]:
    table = json.loads(path.read_bytes())
    stated = tuple(table.get(key) or size[i] for i, key in enumerate(("imageHeight", "imageWidth")))
    if stated != size:
        raise ValueError(f"the annotation is of {stated} pixels (height, width), the image {size}")
    for i, shape in enumerate(table["shapes"]):
        group = shape.get("group_id")
        yield Layer(
            mask(shape, size), _class(shape), i if group is None else (_class(shape), group)
        )


def mask(shape: dict[str, Any], size: Shape) -> Bool[np.ndarray, "h w"]:
    """Returns the pixels of a shape, to the bit as labelme.utils.shape_to_mask draws them.

    Raises ValueError if the shape has no area, or another number of points than its type.
    """
    kind = shape.get("shape_type") or "polygon"
    points = [tuple(point) for point in shape["points"]]
    if kind == "mask":
        (x1, y1), (x2, y2) = np.asarray(points).astype(int)
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as image:
            inside = np.asarray(image).astype(bool)
        whole = np.zeros(size, bool)
        whole[y1 : y2 + 1, x1 : x2 + 1] = inside
        return whole
    picture = Image.new("L", size[::-1])
    draw = ImageDraw.Draw(picture)
    if kind in ("circle", "point"):
        (x, y), *edge = points
        r = _POINT_SIZE
        if kind == "circle":
            ((px, py),) = edge
            r = math.sqrt((x - px) ** 2 + (y - py) ** 2)
        draw.ellipse((x - r, y - r, x + r, y + r), outline=1, fill=1)
    elif kind == "rectangle":
        (x0, y0), (x1, y1) = points
        corners = min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
        draw.rectangle(corners, outline=1, fill=1)
    elif kind in ("line", "linestrip"):
        draw.line(points, fill=1, width=_LINE_WIDTH)
    elif kind in ("polygon", "oriented_rectangle") and len(points) > 2:
        draw.polygon(points, outline=1, fill=1)
    else:
        raise ValueError(f"a {kind} of {len(points)} points has no area")
    return np.asarray(picture).astype(bool)
