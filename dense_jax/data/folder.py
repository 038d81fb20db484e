"""A folder of images and masks.

    ROOT/dataset.json
    ROOT/images/SPLIT/NAME.{png,jpg,jpeg,webp,tif,tiff}     grey or RGB, 8 bits per channel
    ROOT/labels/SPLIT/NAME.png                              raw values, or palette indices
    ROOT/instances/SPLIT/NAME.png                           optional: object numbers, 0 = none

`dataset.json` names the classes and, where the raw values of the label files are not simply
0, 1, 2, ..., says what they mean:

    {"classes": ["background", "cell"],            at most 255
     "values": [0, 255],                           values[i] is the raw value of class i
     "ignored_values": [128],                      raw values that count nowhere
     "palette": [[0, 0, 0], [255, 128, 0]]}        RGB of each class in pictures

Any other raw value is an error, also 255: nothing is ignored that was not declared. Images may
differ in size and format; if every image of every split is grey, so is the dataset. Where a split
has instance files, in 8 or 16 bits, every image has one.
"""

import collections
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Int32

from dense_jax.data import decode

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
_LABEL_SUFFIXES = (".png",)


class Folder:
    """One split of a folder dataset, sorted by NAME; the module's docstring has the layout."""

    def __init__(self, root: str | os.PathLike[str], split: str):
        self._root = pathlib.Path(root)
        self._split = split
        options = _read_options(self._root)
        self.class_names: tuple[str, ...] = tuple(options["classes"])
        self.num_classes = len(self.class_names)
        self.palette = None
        if "palette" in options:
            self.palette = np.array(options["palette"], np.uint8)
        self._table = decode.label_table(options["values"], options["ignored_values"])

        if split not in (splits := self.splits(self._root)):
            raise ValueError(
                f"{self._root}: no split {split!r} (no folder images/{split}); "
                f"there are: {', '.join(splits) or 'none'}"
            )
        self._images = _files(self._root / "images" / split, _IMAGE_SUFFIXES)
        self._labels = _files(self._root / "labels" / split, _LABEL_SUFFIXES)
        if not self._images:
            raise ValueError(
                f"{self._root / 'images' / split}: no images ({', '.join(_IMAGE_SUFFIXES)})"
            )
        _check_partners(self._images, self._labels, f"no label in {self._root}/labels/{split}")
        _check_partners(self._labels, self._images, f"no image in {self._root}/images/{split}")
        self._instances: dict[str, pathlib.Path] = {}
        if (folder := self._root / "instances" / split).is_dir():
            self._instances = _files(folder, _LABEL_SUFFIXES)
            _check_partners(self._images, self._instances, f"no instances in {folder}")
        self.has_instances = bool(self._instances)
        self._names = sorted(self._images)

    @staticmethod
    def splits(root: str | os.PathLike[str]) -> tuple[str, ...]:
        """The splits there are: the folders in ROOT/images."""
        images = pathlib.Path(root) / "images"
        if not images.is_dir():
            raise ValueError(f"{images}: no such folder")
        return tuple(sorted(path.name for path in images.iterdir() if path.is_dir()))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        name = self._names[i]
        with self._images[name].open("rb") as file:
            image = decode.read_image(file, str(self._images[name]), self.num_channels)
        with self._labels[name].open("rb") as file:
            label = decode.read_label(file, str(self._labels[name]), self._table)
        decode.check_same_size(image, label, str(self._images[name]))
        return {"image": image, "label": label, "name": name}

    def instances(self, i: int) -> Int32[np.ndarray, "h w"]:
        """The object that each pixel belongs to, 0 = none; only where the split has such files."""
        name = self._names[i]
        path = self._instances[name]
        with path.open("rb") as file:
            objects = decode.read_label(file, str(path), np.arange(2**16, dtype=np.int32))
        height, width, _ = _header(self._images[name])
        if objects.shape != (height, width):
            raise ValueError(
                f"{path}: {objects.shape[0]} x {objects.shape[1]} pixels (height x width), but its "
                f"image has {height} x {width}"
            )
        return objects

    @functools.cached_property
    def num_channels(self) -> int:
        """1 if every image of every split is grey, else 3."""
        for split in self.splits(self._root):
            for path in _files(self._root / "images" / split, _IMAGE_SUFFIXES).values():
                _, _, grey = _header(path)
                if not grey:
                    return 3
        return 1

    @functools.cached_property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """Height and width of each image, in pixels; reads headers only."""
        return np.array([_header(self._images[name])[:2] for name in self._names], np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of dataset.json and of each file's name, size and time of change."""
        digest = hashlib.sha256((self._root / "dataset.json").read_bytes())
        for name in self._names:
            for files in filter(None, (self._images, self._labels, self._instances)):
                path = files[name]
                stat = path.stat()
                entry = (str(path.relative_to(self._root)), stat.st_size, stat.st_mtime_ns)
                digest.update(repr(entry).encode())
        return digest.hexdigest()


def _header(path: pathlib.Path) -> tuple[int, int, bool]:
    with path.open("rb") as file:
        return decode.image_header(file, str(path))


def _files(folder: pathlib.Path, suffixes: tuple[str, ...]) -> dict[str, pathlib.Path]:
    """The files of a folder by NAME; hidden files and other suffixes are passed over."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files: dict[str, pathlib.Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in files:
                raise ValueError(
                    f"{folder}: {files[path.stem].name} and {path.name} have the same name; "
                    "rename or remove one of them"
                )
            files[path.stem] = path
    return files


def _check_partners(
    files: dict[str, pathlib.Path], partners: dict[str, pathlib.Path], missing: str
) -> None:
    alone = [path.name for name, path in files.items() if name not in partners]
    if alone:
        more = ", ..." if len(alone) > 5 else ""
        raise ValueError(f"{missing} for {len(alone)} files: {', '.join(alone[:5])}{more}")


def _read_options(root: pathlib.Path) -> dict[str, Any]:
    """dataset.json with its defaults filled in; any mistake in it is a ValueError."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    path = root / "dataset.json"
    if not path.is_file():
        raise ValueError(f'{path}: no such file; write at least {{"classes": ["NAME", ...]}}')
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error

    known = ("classes", "values", "ignored_values", "palette")
    if not isinstance(options, dict) or "classes" not in options:
        raise ValueError(f'{path}: expected an object with "classes"')
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{path}: unknown keys {unknown}; valid are {list(known)}")

    classes = options["classes"]
    if not _is_list_of(str, classes) or not 1 <= len(classes) <= 255:
        raise ValueError(f'{path}: "classes" must be a list of 1 to 255 names, got {classes!r}')
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
    return options


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
