"""Describes and reads datasets whose images and labels are files.

A `FilesDataset` describes a dataset by its `Classes` and the possible layouts of its files.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from dense_jax.data import decode
from dense_jax.data.source import Source
from dense_jax.labels import IGNORE_LABEL
from dense_jax.spelling import some

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".npy")
Root = str | os.PathLike[str]
Paths = dict[str, pathlib.Path]  # {NAME: path}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of a dataset. Labels may contain only the raw values that are listed here."""

    names: tuple[str, ...]
    values: tuple[int | tuple[int, ...], ...]  # values[i]: the raw value or values of class i
    ignored_values: tuple[int, ...] = ()
    palette: tuple[tuple[int, ...], ...] | None = None  # the RGB color of each class

    def colors(self) -> UInt8[np.ndarray, "c 3"] | None:
        """Returns the palette as an array, or None if there is no palette."""
        return None if self.palette is None else np.array(self.palette, np.uint8)


class Item(NamedTuple):
    """The files of one example."""

    name: str
    image: pathlib.Path
    label: pathlib.Path
    page: int | None = None  # the page of the image and the label, if the files are stacks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A file layout with one file per image and per label, described by path patterns.

    Patterns are relative to the root. SPLIT and NAME are placeholders, NAME.* matches an image of
    any format, and * as a folder name matches any folder. An image and its label share a NAME.
    """

    images: str
    labels: str
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)  # {split: value of SPLIT}
    lists: str = ""  # files that list the NAMEs of each split, one per line; replaces `folders`

    def splits(self, root: pathlib.Path) -> tuple[str, ...]:
        """Returns the names of the splits that exist below the root."""
        if self.lists:
            lists = root.glob(self.lists.replace("SPLIT", "[!.]*"))
            return tuple(sorted(path.stem for path in lists))
        parent = root / self.images.partition("SPLIT")[0]
        return tuple(split for split, name in self.folders.items() if (parent / name).is_dir())

    def items(self, root: pathlib.Path, split: str) -> list[Item]:
        """Returns each example's files, sorted by name. Raises ValueError if any are missing."""
        images = self.files(root, self.images, split)
        labels = self.files(root, self.labels, split)
        image_path, label_path = (self.path(root, p, split) for p in (self.images, self.labels))
        if not images:
            path = self.path(root, self.lists, split) if self.lists else image_path
            others = not_read(image_path.parent, _endings(image_path.name))
            raise ValueError(f"{path}: no images{others}")
        check_partners(images, labels, "label", label_path)
        check_partners(labels, images, "image", image_path)
        return [Item(name, images[name], labels[name]) for name in sorted(images)]

    def files(self, root: pathlib.Path, pattern: str, split: str) -> Paths:
        """Returns {NAME: path} for a split's files that match `pattern`, except hidden files."""
        file = self.path(root, pattern, split)
        folders = [file.parent]
        if file.parent.name == "*":
            folders = [f for f in sorted(file.parents[1].glob("*/")) if not is_hidden(f.name)]
        files = _by_name(folders, _endings(file.name))
        if not self.lists:
            return files
        path = self.path(root, self.lists, split)
        names = read_list(path)
        for name, line in names.items():
            if name not in files:
                missing = file.with_name(file.name.replace("NAME", name))
                has_ending = name.lower().endswith(IMAGE_ENDINGS)
                hint = "; names are listed without their ending" if has_ending else ""
                raise ValueError(f"{path}, line {line}: there is no {missing}{hint}")
        return {name: files[name] for name in names}

    def path(self, root: pathlib.Path, pattern: str, split: str) -> pathlib.Path:
        """Returns root / pattern with SPLIT replaced by the name of the split's folder."""
        return root / pattern.replace("SPLIT", self.folders.get(split, split))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stacks:
    """A file layout with all images in one multi-page file and all labels in another."""

    images: str
    labels: str
    pages: Mapping[str, range]  # the pages of each split

    def splits(self, root: pathlib.Path) -> tuple[str, ...]:
        """Returns the names of the splits that exist below the root."""
        return tuple(self.pages) if (root / self.images).is_file() else ()

    def items(self, root: pathlib.Path, split: str) -> list[Item]:
        """Returns each example's files and page index, in page order."""
        return [
            Item(f"page_{page:03d}", root / self.images, root / self.labels, page)
            for page in self.pages[split]
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesDataset:
    """A public dataset in its original files. Calling the object opens a split."""

    classes: Classes
    layouts: tuple[Layout | Stacks, ...]  # a split is read from the first layout that has it
    num_channels: int = 3

    def __call__(self, root: Root, split: str) -> "Files":
        root = pathlib.Path(root)
        for layout in self.layouts:
            if split in layout.splits(root):
                return Files(root, layout.items(root, split), self.classes, self.num_channels)
        raise ValueError(f"{root}: no split {split!r}; there are: {', '.join(self.splits(root))}")

    def splits(self, root: Root) -> tuple[str, ...]:
        """Returns the names of the splits that exist. Raises ValueError if there are none."""
        root = pathlib.Path(root)
        splits = [split for layout in self.layouts for split in layout.splits(root)]
        if not splits:
            expected = " or ".join(layout.images for layout in self.layouts)
            raise ValueError(f"{root}: holds no images as {expected}")
        return tuple(dict.fromkeys(splits))


class Files(Source):
    """One split of a dataset that consists of image and label files.

    value_range, dtype: See `decode.read_image`.
    """

    def __init__(
        self,
        root: pathlib.Path,
        items: list[Item],
        classes: Classes,
        num_channels: int,
        value_range: decode.Range | None = None,
        dtype: str = "uint8",
    ):
        self._root = root
        self._items = items
        self._classes = classes
        self._table = decode.label_table(classes.values, classes.ignored_values)
        self.class_names = classes.names
        self.num_channels = num_channels
        self.values = classes.values
        self.value_range = value_range
        self.dtype = dtype
        self.palette = classes.colors()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        name, image_path, label_path, page = self._items[i]
        of_page = "" if page is None else f", page {page}"
        where = f"{image_path}{of_page}"
        with image_path.open("rb") as file:
            image = decode.read_image(
                *(file, where, self.num_channels),
                page=page,
                dtype=self.dtype,
                value_range=self.value_range,
            )
        with label_path.open("rb") as file:
            label = decode.read_label(file, f"{label_path}{of_page}", self._table, page)
        decode.check_same_size(image, label, where)
        example = {"image": np.ma.getdata(image), "label": label, "name": name}
        if isinstance(image, np.ma.MaskedArray):
            nodata = np.ma.getmaskarray(image)[..., 0]
            return example | {"label": np.where(nodata, IGNORE_LABEL, label), "nodata": nodata}
        return example

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self._items)

    @functools.cached_property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """Returns the height and width of each image in pixels. Reads only the image headers."""
        return np.array([header(item.image, item.page)[:2] for item in self._items], np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        paths = (path for item in self._items for path in self._paths(item))
        files = {composed(path.relative_to(self._root).as_posix()): path for path in paths}
        meaning = dataclasses.replace(self._classes, palette=None)  # colors do not affect results
        return fingerprint(repr((meaning, self.value_range)), files)

    def _paths(self, item: Item) -> Iterable[pathlib.Path]:
        return item.image, item.label


def fingerprint(about: str, files: Mapping[str, pathlib.Path]) -> str:
    """Returns a hex digest of `about` and of the name, size and last 4096 bytes of each file.

    Copies of the files have the same digest. An edit that keeps the size and the last 4096 bytes of
    a file does not change the digest.
    """
    # The pixel data of a PNG file ends with a checksum, so a change to the pixels is not missed.
    digest = hashlib.sha256(about.encode())
    for name, path in files.items():
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            digest.update(repr((name, size, file.read())).encode())
    return digest.hexdigest()


def header(path: pathlib.Path, page: int | None = None) -> decode.Header:
    """Returns the header of an image file."""
    with path.open("rb") as file:
        return decode.image_header(file, str(path), page)


def read_json(path: pathlib.Path, hint: str, **options: Any) -> Any:
    """Reads a JSON file. Raises ValueError if the file is missing or invalid.

    hint: The advice to show if the file is missing. options: Arguments for `json.loads`.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {hint}")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), **options)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def read_list(path: pathlib.Path) -> dict[str, int]:
    """Reads a file with one name per line. Returns {name: line number}."""
    lines: dict[str, int] = {}
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        if (name := composed(line.strip())) in lines:
            raise ValueError(f"{path}, line {number}: {name!r} again, as on line {lines[name]}")
        if name:
            lines[name] = number
    return lines


def check_partners(files: Paths, partners: Paths, kind: str, pattern: pathlib.Path) -> None:
    """Raises ValueError if a file has no partner, such as an image without a label.

    kind: What a partner is called in the message, such as "label".
    pattern: The path of a partner, with the placeholder NAME.
    """
    if alone := [path.name for name, path in files.items() if name not in partners]:
        raise ValueError(
            f"no {kind} in {pattern.parent} for {len(alone)} files: {some(alone)}"
            f"{not_read(pattern.parent, _endings(pattern.name))}"
        )


def is_hidden(name: str) -> bool:
    """Returns whether a file is hidden or a system file, such as @eaDir or lost+found."""
    return name.startswith((".", "@", "#", "$", "__")) or name == "lost+found"


def not_read(folder: pathlib.Path, endings: Sequence[str] = IMAGE_ENDINGS) -> str:
    """Returns a note that lists the entries of `folder` whose ending is not in `endings`, or ""."""
    others = [
        entry.name + "/" * entry.is_dir()
        for entry in (_entries(folder) if folder.is_dir() else [])
        if not is_hidden(entry.name) and _ending(entry, endings) is None
    ]
    return f"; not read: {some(others)} (only {', '.join(endings)})" if others else ""


def _entries(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    return sorted(os.scandir(folder), key=lambda entry: entry.name)


def _endings(pattern: str) -> tuple[str, ...]:
    """Returns the file extensions that a pattern allows after NAME."""
    ending = pattern.rpartition("NAME")[2]
    return IMAGE_ENDINGS if ending == ".*" else (ending,)


def _ending(entry: os.DirEntry[str], endings: Sequence[str]) -> str | None:
    """Returns the element of `endings` that matches the end of a file's name, or None.

    Always returns None for folders and hidden files.
    """
    if entry.name.startswith(".") or entry.is_dir():
        return None
    return next((e for e in endings if entry.name.lower().endswith(e.lower())), None)


def composed(name: str) -> str:
    """Normalizes a name to Unicode NFC, because macOS may store umlauts in decomposed form."""
    return unicodedata.normalize("NFC", name)


def _by_name(folders: Iterable[pathlib.Path], endings: tuple[str, ...]) -> Paths:
    """Returns {NAME: path} for the files in `folders`. NAME is the file name without extension."""
    files: Paths = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        for entry in _entries(folder):
            if (ending := _ending(entry, endings)) is None:
                continue
            name = composed(entry.name[: -len(ending)])
            if name in files:
                raise ValueError(
                    f"{folder}: {files[name].name} and {entry.name} have the same name; "
                    "rename or remove one of them"
                )
            files[name] = folder / entry.name
    return files
