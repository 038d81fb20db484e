"""A folder of images and masks.

    ROOT/dataset.json
    ROOT/images/SPLIT/NAME.{png,jpg,jpeg,webp,tif,tiff,npy}   any number of channels
    ROOT/labels/SPLIT/NAME.png                                raw values, or palette indices
    ROOT/instances/SPLIT/NAME.png                             optional: object numbers, 0 = none

or, with files that list the NAMEs of each split, one on each line,

    ROOT/splits/SPLIT.txt
    ROOT/images/NAME.*, ROOT/labels/NAME.png, ROOT/instances/NAME.png

`dataset.json` names the classes and, where the raw values of the files are not simply 0, 1, 2, ...
in labels and 0..255 in images, says what they mean:

    {"classes": ["background", "cell"],            2 to 255
     "values": [0, 255],                           values[i] is the raw value of class i
     "ignored_values": [128],                      raw values that count nowhere
     "palette": [[0, 0, 0], [255, 128, 0]],        RGB of each class in pictures
     "range": [0, 4095]}                           what becomes 0 and 255 in images not of 8 bits

Any other raw value is an error, also 255: nothing is ignored that was not declared. Images may
differ in size and format, not in the number of channels, except that a mix of gray and RGB is RGB.
A .npy array is [h, w] or [h, w, c]. Where a split has instance files, in 8 or 16 bits, every image
has one.
"""

import collections
import contextlib
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int32

from dense_jax.data import decode, files
from dense_jax.data.files import Classes, Item, Layout, Root


class Folder(files.Files):
    """One split of a folder dataset, sorted by NAME; the module's docstring has the layout."""

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
            _check_disjoint(root / layout.lists.replace("SPLIT", split) for split in splits)
        items = layout.items(root, split)
        instances = layout.labels.replace("labels", "instances")
        self._instances: dict[str, pathlib.Path] = {}
        if (folder := layout.folder(root, instances, split)).is_dir():
            self._instances = layout.files(root, instances, split)
            images = {item.name: item.image for item in items}
            files.check_partners(images, self._instances, "instances", folder / "NAME.png")
        self.has_instances = bool(self._instances)
        images = (p for s in splits for p in layout.files(root, layout.images, s).values())
        super().__init__(
            root,
            items,
            Classes(
                names=tuple(options["classes"]),
                values=tuple(options["values"]),
                ignored_values=tuple(options["ignored_values"]),
                palette=tuple(map(tuple, options["palette"])) if "palette" in options else None,
            ),
            _num_channels(images),
            tuple(options["range"]) if "range" in options else None,
        )

    @staticmethod
    def splits(root: Root) -> tuple[str, ...]:
        """The splits there are: the files in ROOT/splits, or else the folders in ROOT/images."""
        root = pathlib.Path(root)
        return _layout(root).splits(root)

    def instances(self, i: int) -> Int32[np.ndarray, "h w"]:
        """The object that each pixel belongs to, 0 = none; only where the split has such files."""
        item = self._items[i]
        path = self._instances[item.name]
        with path.open("rb") as file:
            objects = decode.read_label(file, str(path), np.arange(2**16, dtype=np.int32))
        height, width, _ = files.header(item.image)
        if objects.shape != (height, width):
            raise ValueError(
                f"{path}: {objects.shape[0]} x {objects.shape[1]} pixels (height x width), but its "
                f"image has {height} x {width}"
            )
        return objects

    @property
    def not_taken(self) -> str:
        """The end of a message: what lies beside the split's images and is not read."""
        return files.not_taken(self._items[0].image.parent)

    def _paths(self, item: Item) -> Iterable[pathlib.Path]:
        instances = [self._instances[item.name]] if self.has_instances else []
        return [item.image, item.label, *instances]


def _layout(root: pathlib.Path) -> Layout:
    if (root / "splits").is_dir():
        return Layout(images="images/NAME.*", labels="labels/NAME.png", lists="splits/SPLIT.txt")
    images = root / "images"
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder")
    return Layout(
        images="images/SPLIT/NAME.*",
        labels="labels/SPLIT/NAME.png",
        folders={
            path.name: path.name
            for path in sorted(images.iterdir())
            if not files.is_hidden(path.name)
        },
    )


def _check_disjoint(lists: Iterable[pathlib.Path]) -> None:
    """Raises ValueError if two splits share an image: scores on one would flatter the other."""
    seen: dict[str, str] = {}
    for path in lists:
        for name, line in files.read_list(path).items():
            if name in seen:
                raise ValueError(f"{path}, line {line}: {name!r} is also in {seen[name]}")
            seen[name] = f"{path}, line {line}"


def _num_channels(images: Iterable[pathlib.Path]) -> int:
    """That of every image; of gray and RGB images, RGB's."""
    found: dict[int, pathlib.Path] = {}
    for path in images:
        # Reading its example will tell what is wrong with it.
        with contextlib.suppress(ValueError, OSError):
            found.setdefault(files.header(path)[2], path)
    if len(found) > 1 and found.keys() != {1, 3}:
        each = ", ".join(f"{path} has {channels}" for channels, path in sorted(found.items()))
        raise ValueError(f"images differ in their number of channels: {each}")
    return max(found, default=3)


def _read_options(root: pathlib.Path) -> dict[str, Any]:
    """dataset.json with its defaults filled in; any mistake in it is a ValueError."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    path = root / "dataset.json"
    if not path.is_file():
        raise ValueError(f'{path}: no such file; write at least {{"classes": ["NAME", ...]}}')
    try:
        options = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error

    known = ("classes", "values", "ignored_values", "palette", "range")
    if not isinstance(options, dict) or "classes" not in options:
        raise ValueError(f'{path}: expected an object with "classes"')
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{path}: unknown keys {unknown}; valid are {list(known)}")

    classes = options["classes"]
    if (
        not _is_list_of(str, classes)
        or not 1 <= len(classes) <= 255
        or not all(map(str.strip, classes))
    ):
        raise ValueError(f'{path}: "classes" must be a list of 2 to 255 names, got {classes!r}')
    if len(classes) == 1:
        raise ValueError(
            f"{path}: a single class leaves nothing to tell apart; name what is around it, too: "
            f'"classes": ["background", {json.dumps(classes[0], ensure_ascii=False)}]'
        )
    options.setdefault("values", list(range(len(classes))))
    options.setdefault("ignored_values", [])
    for key in ("values", "ignored_values"):
        if not _is_list_of(int, options[key]) or any(not 0 <= v < 2**16 for v in options[key]):
            raise ValueError(
                f'{path}: "{key}" must be a list of integers in 0..65535, got {options[key]!r}'
            )
    if len(options["values"]) != len(classes):
        raise ValueError(
            f"{path}: {len(classes)} classes but {len(options['values'])} values; give one per class"
        )
    for what, items in (
        ('"classes"', classes),
        ('"values" and "ignored_values"', options["values"] + options["ignored_values"]),
    ):
        if twice := [item for item, n in collections.Counter(items).items() if n > 1]:
            raise ValueError(f"{path}: {twice} more than once in {what}")
    if "palette" in options:
        palette = np.array(options["palette"], dtype=object)
        if palette.shape != (len(classes), 3) or any(c not in range(256) for c in palette.flat):
            raise ValueError(
                f'{path}: "palette" must hold [red, green, blue] in 0..255 for each of the '
                f"{len(classes)} classes"
            )
    if "range" in options:
        limits = options["range"]
        is_pair = (
            isinstance(limits, list) and [type(x) in (int, float) for x in limits] == [True] * 2
        )
        if not is_pair or not all(map(math.isfinite, limits)) or limits[0] >= limits[1]:
            raise ValueError(f'{path}: "range" must be [LOW, HIGH], got {limits!r}')
    return options


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object. Raises ValueError if a key is given twice: the last would win silently."""
    keys = collections.Counter(key for key, _ in pairs)
    if twice := [key for key, n in keys.items() if n > 1]:
        raise ValueError(f"{twice} more than once")
    return dict(pairs)


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
