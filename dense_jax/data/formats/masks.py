"""Masks as image files: one in the classes' colors, or one for each class or object."""

import functools
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from dense_jax.data.formats import export
from dense_jax.data.formats.export import IGNORED, Export, Item, Layer, Shape
from dense_jax.spelling import some

Masks = list[tuple[dict[str, str], pathlib.Path]]  # those of one image, as `export.find` has them

_COLOR = re.compile(r"(.+?):\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*(:.*)?")


def read_colors(images: str, masks: str, colors: str) -> Export:
    """Reads masks whose colors are classes. The gray value V is the color V,V,V.

    colors: A file with a line NAME:RED,GREEN,BLUE for each color, such as CVAT's labelmap.txt. A
      NAME with several colors is one class. Pixels of the color of __ignore__ are ignored.
    """
    names = _read_colors(pathlib.Path(colors))
    class_names = [name for name in dict.fromkeys(names.values()) if name != IGNORED]
    first = {name: code for code, name in reversed(names.items())}
    items: list[Item] = []
    for split, name, image, of_image in _pairs(images, masks):
        paths = tuple(path for _, path in of_image)
        if len(paths) > 1:
            raise ValueError(
                f"{masks}: finds {len(paths)} masks of {image}, but one has all classes"
            )
        layers = functools.partial(_colored, paths[0], names)
        items.append(Item(split, name, image, layers, paths, repr(names)))
    palette = [list(first[name].to_bytes(3, "big")) for name in class_names]
    return Export(items, class_names, rest=IGNORED, has_objects=False, palette=palette)


def read(images: str, masks: str) -> Export:
    """Reads masks of one class or object each, which is what is neither black nor transparent.

    The class is what CLASS stands for in the pattern of the masks, or "object" without CLASS. A
    pattern with * finds several masks of an image and a class: each is an object.
    """
    names: set[str] = set()
    items: list[Item] = []
    for split, name, image, of_image in _pairs(images, masks):
        found = [(holes.get("CLASS", "object"), path) for holes, path in of_image]
        names |= {class_name for class_name, _ in found}
        layers, paths = functools.partial(_binary, found), tuple(path for _, path in found)
        items.append(Item(split, name, image, layers, paths, repr([n for n, _ in found])))
    order = "the later mask by file name lies on top"
    class_names = export.with_background(sorted(names))
    return Export(items, class_names, order, has_objects="*" in masks)


def _pairs(images: str, masks: str) -> list[tuple[str | None, str, pathlib.Path, Masks]]:
    """Returns (split, name, image, masks) for each image. Raises ValueError if one has no mask."""
    of_image: dict[tuple, Masks] = defaultdict(list)
    found = export.find(export.named(masks, ".png"))
    for holes, path in found:
        of_image[holes.get("SPLIT"), holes["NAME"]].append((holes, path))
    paths = {path for _, path in found}  # which may lie in the folder of the images
    pairs = []
    for holes, path in export.find(export.named(images, ".*")):
        if path not in paths:
            split, name = holes.get("SPLIT"), holes["NAME"]
            pairs.append((split, name, path, of_image.pop((split, name), [])))
    if alone := [str(image) for *_, image, masks_of in pairs if not masks_of]:
        raise ValueError(
            f"no mask {masks} for {len(alone)} images: {some(alone)}; move them away or, if "
            "nothing is on them, save a black mask"
        )
    if of_image:
        alone = [str(path) for found in of_image.values() for _, path in found]
        raise ValueError(f"no image {images} for {len(alone)} masks: {some(alone)}")
    return pairs


def _read_colors(path: pathlib.Path) -> dict[int, str]:
    """Returns {65536 red + 256 green + blue: NAME}."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; write a line NAME:RED,GREEN,BLUE for each color")
    names: dict[int, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _COLOR.fullmatch(line.strip())
        if not match or any(int(value) > 255 for value in match.groups()[1:4]):
            raise ValueError(f"{path}, line {number}: must be NAME:RED,GREEN,BLUE, got {line!r}")
        name, *rgb = match.groups()[:4]
        code = int.from_bytes(map(int, rgb), "big")
        if names.setdefault(code, name) != name:
            raise ValueError(f"{path}, line {number}: {names[code]!r} has the color of {name!r}")
    return names


def _codes(path: pathlib.Path) -> Int[np.ndarray, "h w"]:
    """Reads a mask. Returns 65536 red + 256 green + blue."""
    return export.read_rgb(path) @ np.array([65536, 256, 1])


def _colored(path: pathlib.Path, names: dict[int, str], shape: Shape) -> Iterator[Layer]:
    codes = _codes(path)
    values, counts = np.unique(codes, return_counts=True)
    unknown = [
        f"{','.join(map(str, int(value).to_bytes(3, 'big')))} ({count} pixels)"
        for value, count in zip(values, counts, strict=True)
        if value not in names
    ]
    if unknown:
        raise ValueError(f"has colors that --colors does not list: {some(unknown)}")
    for value in values:
        yield Layer(codes == value, names[int(value)])


def _binary(masks: list[tuple[str, pathlib.Path]], shape: Shape) -> Iterator[Layer]:
    for class_name, path in masks:
        codes = _codes(path)
        if (number := np.count_nonzero(np.unique(codes))) > 1:
            raise ValueError(
                f"{path.name} has {number} colors besides black, but is the mask of one class or "
                "object; if colors are classes, use --from=colors"
            )
        yield Layer(codes > 0, class_name, path)
