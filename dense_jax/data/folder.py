"""Reads a dataset from a folder of images and labels.

    ROOT/dataset.json
    ROOT/images/SPLIT/NAME.{png,jpg,jpeg,webp,tif,tiff,npy}   any number of channels
    ROOT/labels/SPLIT/NAME.png                                raw values or palette indices
    ROOT/instances/SPLIT/NAME.png                             optional: object numbers, 0 = none

Alternatively, a text file lists the NAMEs of each split, one per line:

    ROOT/splits/SPLIT.txt
    ROOT/images/NAME.*, ROOT/labels/NAME.png, ROOT/instances/NAME.png

`dataset.json` names the classes. Only "classes" is required if the raw label values are 0, 1, 2,
... and the images are 8-bit. For example:

    {"classes": ["background", "cell"],            2 to 255 class names
     "values": [0, 255],                           values[i] is the raw value of class i
     "ignored_values": [128],                      raw values of ignored pixels
     "palette": [[0, 0, 0], [255, 128, 0]],        RGB color of each class in pictures
     "regions": {"cells": ["cell"]},               what the network learns; see docs/regions.md
     "range": [0, 4095]}                           black and white of images that are not 8-bit

A class may have several raw values, "values": [0, [100, 255]]: so classes are merged without new
label files. A raw label value that is not listed in `dataset.json` is an error, even 255. Images may differ in
size and format but not in the number of channels. If gray and RGB images are mixed, all become RGB.
A .npy array is [h, w] or [h, w, c]. Instance files have 8 or 16 bits. If one image of a split has
an instance file, every image of the split must have one.

Images reach the network with all their values: as uint8 or uint16 if all images have this type, and
otherwise as float32. "range" says which values are black and white, that is, gray levels 0 and 255.
Values outside the range are kept. Images that are not 8-bit need a range, unless the network
normalizes by their own values (config.model.normalization is "image", "percentiles" or "dataset").
If 8-bit images are mixed with others, their 0 and 255 are the two values of the range.

Pixels of a GeoTIFF file that have GDAL's nodata value in all bands are ignored, whatever their label.
"""

import collections
import contextlib
import json
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32

from dense_jax import regions
from dense_jax.data import decode, files
from dense_jax.data.files import Classes, Item, Layout, Root


class Folder(files.Files):
    """One split of a folder dataset, sorted by NAME. See the module docstring."""

    def __init__(self, root: Root, split: str):
        root = pathlib.Path(root)
        options = _read_options(root)
        layout = _layout(root)
        splits = layout.splits(root)
        if split not in splits:
            raise ValueError(
                f"{root}: no split {split!r} (no {layout.lists or 'folder images/SPLIT'}); "
                f"there are: {', '.join(splits) or 'none'}"
            )
        if layout.lists:
            check_disjoint(layout.path(root, layout.lists, split) for split in splits)
        items = layout.items(root, split)
        self._instances: files.Paths = {}
        instances = layout.labels.replace("labels", "instances")
        if (path := layout.path(root, instances, split)).parent.is_dir():
            self._instances = layout.files(root, instances, split)
            images = {item.name: item.image for item in items}
            files.check_partners(images, self._instances, "instances", path)
        self.has_instances = bool(self._instances)
        palette = options.get("palette")
        value_range = options.get("range")
        num_channels, dtype = _pixels(
            p for s in splits for p in layout.files(root, layout.images, s).values()
        )
        super().__init__(
            root,
            items,
            Classes(
                names=tuple(options["classes"]),
                values=tuple(tuple(v) if isinstance(v, list) else v for v in options["values"]),
                ignored_values=tuple(options["ignored_values"]),
                palette=palette and tuple(map(tuple, palette)),
            ),
            num_channels,
            value_range and tuple(value_range),
            dtype,
        )
        self.regions = regions.read(self.class_names, options.get("regions"))

    @staticmethod
    def splits(root: Root) -> tuple[str, ...]:
        """Returns the names of the splits, from ROOT/splits if it exists, else from ROOT/images."""
        root = pathlib.Path(root)
        return _layout(root).splits(root)

    def instances(self, i: int) -> Int32[np.ndarray, "h w"]:
        item = self._items[i]
        path = self._instances[item.name]
        with path.open("rb") as file:
            objects = decode.read_label(file, str(path), np.arange(2**16, dtype=np.int32))
        height, width, *_ = files.header(item.image)
        if objects.shape != (height, width):
            raise ValueError(
                f"{path}: {objects.shape[0]} x {objects.shape[1]} pixels (height x width), but its "
                f"image has {height} x {width}"
            )
        return objects

    @property
    def not_read(self) -> str:
        """Returns a note that lists the non-image files in the image folder, or "" if none."""
        return files.not_read(self._items[0].image.parent)

    def _paths(self, item: Item) -> Iterable[pathlib.Path]:
        instances = [self._instances[item.name]] if self.has_instances else []
        return [item.image, item.label, *instances]


def _layout(root: pathlib.Path) -> Layout:
    if (root / "splits").is_dir():
        return Layout(images="images/NAME.*", labels="labels/NAME.png", lists="splits/SPLIT.txt")
    images = root / "images"
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder")
    names = sorted(path.name for path in images.iterdir() if not files.is_hidden(path.name))
    return Layout(
        images="images/SPLIT/NAME.*",
        labels="labels/SPLIT/NAME.png",
        folders=dict(zip(names, names, strict=True)),
    )


def check_disjoint(lists: Iterable[pathlib.Path]) -> None:
    """Raises ValueError if an image is in two of the lists, that is, in two splits."""
    seen: dict[str, str] = {}
    for path in lists:
        for name, line in files.read_list(path).items():
            if name in seen:
                raise ValueError(f"{path}, line {line}: {name!r} is also in {seen[name]}")
            seen[name] = f"{path}, line {line}"


def _pixels(images: Iterable[pathlib.Path]) -> tuple[int, str]:
    """Returns the number of channels and the dtype of all images.

    If gray and RGB images are mixed, the number of channels is 3. The dtype is uint8 or uint16 if
    all images have it, and otherwise float32.
    """
    examples: dict[int, pathlib.Path] = {}
    dtypes: set[str] = set()
    for path in images:
        with contextlib.suppress(ValueError, OSError):  # reported when the example is read
            header = files.header(path)
            examples.setdefault(header.channels, path)
            dtypes.add(header.dtype.name)
    if len(examples) > 1 and examples.keys() != {1, 3}:
        differing = ", ".join(f"{path} has {c}" for c, path in sorted(examples.items()))
        raise ValueError(f"images differ in their number of channels: {differing}")
    alike = any(dtypes <= {dtype} for dtype in ("uint8", "uint16"))
    return max(examples, default=3), max(dtypes, default="uint8") if alike else "float32"


def _read_options(root: pathlib.Path) -> dict[str, Any]:
    """Reads dataset.json and fills in defaults. Raises ValueError if the file has a mistake."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    path = root / "dataset.json"
    hint = 'write at least {"classes": ["NAME", ...]}'
    options = files.read_json(path, hint, object_pairs_hook=_unique)
    check(options, path)
    return options


def check(options: Any, path: pathlib.Path) -> None:
    """Fills in the defaults of dataset.json. Raises ValueError if it has a mistake."""
    for mistake in _mistakes(options):
        raise ValueError(f"{path}: {mistake}")


def _mistakes(options: Any) -> Iterator[str]:
    """Yields the mistakes in dataset.json. Each check assumes that the earlier checks passed."""
    known = ("classes", "values", "ignored_values", "palette", "range", "regions")
    if not isinstance(options, dict) or "classes" not in options:
        yield 'expected an object with "classes"'
    if unknown := sorted(set(options) - set(known)):
        yield f"unknown keys {unknown}; valid are {list(known)}"

    classes = options["classes"]
    is_named = _is_list_of(str, classes) and all(map(str.strip, classes))
    if not is_named or not 1 <= len(classes) <= 255:
        yield f'"classes" must be a list of 2 to 255 names, got {classes!r}'
    if len(classes) == 1:
        yield (
            "a single class leaves nothing to tell apart; name what is around it, too: "
            f'"classes": ["background", {json.dumps(classes[0], ensure_ascii=False)}]'
        )
    values = options.setdefault("values", list(range(len(classes))))
    ignored_values = options.setdefault("ignored_values", [])
    if not _are_values(ignored_values):
        yield f'"ignored_values" must be a list of integers in 0..65535, got {ignored_values!r}'
    merged = [v if isinstance(v, list) else [v] for v in values] if type(values) is list else [[]]
    if not all(map(_are_values, merged)) or [] in merged:
        yield (
            '"values" must be a list of integers in 0..65535, or of lists of them where a class has '
            f"several values, got {values!r}"
        )
    if len(values) != len(classes):
        yield f"{len(classes)} classes but {len(values)} values; give one per class"
    if repeated := _repeated(classes):
        yield f'{repeated} more than once in "classes"'
    owners = [*zip(classes, merged, strict=True), ("ignored_values", ignored_values)]
    if repeated := _repeated(value for _, raw in owners for value in raw):
        names = [name for name, raw in owners for value in raw if value in repeated]
        yield f'{repeated} more than once in "values" and "ignored_values": {", ".join(names)}'
    if "regions" in options:
        try:
            regions.read(classes, options["regions"] or {})
        except ValueError as error:
            yield str(error)
    if "palette" in options:
        palette = np.array(options["palette"], dtype=object)
        if palette.shape != (len(classes), 3) or any(c not in range(256) for c in palette.flat):
            yield (
                '"palette" must hold [red, green, blue] in 0..255 for each of the '
                f"{len(classes)} classes"
            )
    if "range" in options:
        limits = options["range"]
        is_pair = isinstance(limits, list) and len(limits) == 2
        is_pair = is_pair and all(type(x) in (int, float) and math.isfinite(x) for x in limits)
        if not is_pair or limits[0] >= limits[1]:
            yield f'"range" must be [LOW, HIGH], got {limits!r}'


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Converts the pairs of a JSON object to a dict. Raises ValueError if a key is repeated."""
    if repeated := _repeated(key for key, _ in pairs):
        raise ValueError(f"{repeated} more than once")
    return dict(pairs)


def _repeated(items: Iterable[Any]) -> list[Any]:
    return [item for item, count in collections.Counter(items).items() if count > 1]


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _are_values(items: Any) -> bool:
    return _is_list_of(int, items) and all(0 <= item < 2**16 for item in items)
