"""Datasets whose images and labels are files: where these lie and what the labels mean.

Such a dataset is a `FilesDataset`: its `Classes`, and each `Layout` that its files may have.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from dense_jax.data import decode
from dense_jax.data.source import Source

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".npy")
Root = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes:
    """What the raw values of labels mean; any other value is an error."""

    names: tuple[str, ...]
    values: tuple[int | tuple[int, ...], ...]  # values[i]: the raw value or values of class i
    ignored_values: tuple[int, ...] = ()
    palette: tuple[tuple[int, ...], ...] | None = None  # RGB of each class


class Item(NamedTuple):
    """An example that is still in its files."""

    name: str
    image: pathlib.Path
    label: pathlib.Path
    page: int | None = None  # of both files, where they are stacks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Images and labels in folders: their paths below the root, with SPLIT and NAME in them.

    An image and its label have the same NAME; NAME.* is an image of any format, and * any folder.
    """

    images: str
    labels: str
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)  # split: what SPLIT is
    lists: str = ""  # or the files that list the NAMEs of each split, one a line

    def splits(self, root: pathlib.Path) -> tuple[str, ...]:
        """The splits there are."""
        if self.lists:
            lists = root.glob(self.lists.replace("SPLIT", "[!.]*"))
            return tuple(sorted(path.stem for path in lists))
        above = root / self.images.partition("SPLIT")[0]
        return tuple(split for split, name in self.folders.items() if (above / name).is_dir())

    def items(self, root: pathlib.Path, split: str) -> list[Item]:
        """The examples of a split, sorted by name; anything odd about its files is a ValueError."""
        images = self.files(root, self.images, split)
        labels = self.files(root, self.labels, split)
        if not images:
            path = self._path(root, self.lists or self.images, split)
            folder, endings = self.folder(root, self.images, split), _endings(self.images)
            raise ValueError(f"{path}: no images{not_taken(folder, endings)}")
        check_partners(images, labels, "label", self._path(root, self.labels, split))
        check_partners(labels, images, "image", self._path(root, self.images, split))
        return [Item(name, images[name], labels[name]) for name in sorted(images)]

    def folder(self, root: pathlib.Path, pattern: str, split: str) -> pathlib.Path:
        """Where the files of a split lie; * stands for any folder."""
        return self._path(root, pattern, split).parent

    def files(self, root: pathlib.Path, pattern: str, split: str) -> dict[str, pathlib.Path]:
        """The files of a split by NAME; hidden files and other endings are passed over."""
        folder = self.folder(root, pattern, split)
        folders = [folder]
        if folder.name == "*":
            folders = [f for f in sorted(folder.parent.glob("*/")) if not is_hidden(f.name)]
        files = _by_name(folders, _endings(pattern))
        if not self.lists:
            return files
        path = self._path(root, self.lists, split)
        listed = read_list(path)
        for name, line in listed.items():
            if name not in files:
                missing = folder / pattern.rpartition("/")[2].replace("NAME", name)
                hint = "; names are listed without their ending" * name.lower().endswith(
                    IMAGE_ENDINGS
                )
                raise ValueError(f"{path}, line {line}: there is no {missing}{hint}")
        return {name: files[name] for name in listed}

    def _path(self, root: pathlib.Path, pattern: str, split: str) -> pathlib.Path:
        return root / pattern.replace("SPLIT", self.folders.get(split, split))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stacks:
    """Images and labels as the pages of two files."""

    images: str
    labels: str
    pages: Mapping[str, range]  # of each split

    def splits(self, root: pathlib.Path) -> tuple[str, ...]:
        """The splits there are."""
        return tuple(self.pages) if (root / self.images).is_file() else ()

    def items(self, root: pathlib.Path, split: str) -> list[Item]:
        """The examples of a split, in order."""
        return [
            Item(f"page_{page:03d}", root / self.images, root / self.labels, page)
            for page in self.pages[split]
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesDataset:
    """A public dataset, as it is downloaded; call it to open a split."""

    classes: Classes
    layouts: tuple[Layout | Stacks, ...]  # the first that has a split is where it is read from
    num_channels: int = 3

    def __call__(self, root: Root, split: str) -> "Files":
        root = pathlib.Path(root)
        for layout in self.layouts:
            if split in layout.splits(root):
                return Files(root, layout.items(root, split), self.classes, self.num_channels)
        raise ValueError(f"{root}: no split {split!r}; there are: {', '.join(self.splits(root))}")

    def splits(self, root: Root) -> tuple[str, ...]:
        """The splits there are."""
        root = pathlib.Path(root)
        found = [split for layout in self.layouts for split in layout.splits(root)]
        if not found:
            expected = " or ".join(layout.images for layout in self.layouts)
            raise ValueError(f"{root}: holds no images as {expected}")
        return tuple(dict.fromkeys(found))


class Files(Source):
    """One split of a dataset of image and label files.

    value_range: see `decode.read_image`.
    """

    def __init__(
        self,
        root: pathlib.Path,
        items: list[Item],
        classes: Classes,
        num_channels: int,
        value_range: decode.Range | None = None,
    ):
        self._root = root
        self._items = items
        self._classes = classes
        self._table = decode.label_table(classes.values, classes.ignored_values)
        self.class_names = classes.names
        self.num_channels = num_channels
        self.values = classes.values
        self.value_range = value_range
        self.palette = None if classes.palette is None else np.array(classes.palette, np.uint8)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        name, image_path, label_path, page = self._items[i]
        where = "" if page is None else f", page {page}"
        with image_path.open("rb") as file:
            image = decode.read_image(
                file,
                f"{image_path}{where}",
                self.num_channels,
                page=page,
                value_range=self.value_range,
            )
        with label_path.open("rb") as file:
            label = decode.read_label(file, f"{label_path}{where}", self._table, page)
        decode.check_same_size(image, label, f"{image_path}{where}")
        return {"image": image, "label": label, "name": name}

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self._items)

    @functools.cached_property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """Height and width of each image, in pixels; reads headers only."""
        return np.array([header(item.image, item.page)[:2] for item in self._items], np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """As of `fingerprint`, also of what values mean."""
        paths = (path for item in self._items for path in self._paths(item))
        files = {_composed(path.relative_to(self._root).as_posix()): path for path in paths}
        meaning = dataclasses.replace(self._classes, palette=None)  # colors change no number
        return fingerprint(repr((meaning, self.value_range)), files)

    def _paths(self, item: Item) -> Iterable[pathlib.Path]:
        return item.image, item.label


def fingerprint(about: str, files: Mapping[str, pathlib.Path]) -> str:
    """Hex digest of a text and of each file's name, size and end.

    Neither of folders nor of times, so that a copy on another machine has the same. A PNG ends with
    a checksum of all its pixels; of what is not compressed, a change before the end is not seen.
    """
    digest = hashlib.sha256(about.encode())
    for name, path in files.items():
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            digest.update(repr((name, size, file.read())).encode())
    return digest.hexdigest()


def header(path: pathlib.Path, page: int | None = None) -> tuple[int, int, int]:
    """An image file's height and width in pixels and its number of channels."""
    with path.open("rb") as file:
        return decode.image_header(file, str(path), page)


def read_list(path: pathlib.Path) -> dict[str, int]:
    """The names in a file, one on each line, and the lines they are on."""
    lines: dict[str, int] = {}
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        if (name := _composed(line.strip())) in lines:
            raise ValueError(f"{path}, line {number}: {name!r} again, as on line {lines[name]}")
        if name:
            lines[name] = number
    return lines


def check_partners(
    files: Mapping[str, pathlib.Path],
    partners: Mapping[str, pathlib.Path],
    kind: str,
    pattern: pathlib.Path,
) -> None:
    """Raises ValueError where a file has no partner. kind, pattern: what partners are, and where."""
    if alone := [path.name for name, path in files.items() if name not in partners]:
        raise ValueError(
            f"no {kind} in {pattern.parent} for {len(alone)} files: {some(alone)}"
            f"{not_taken(pattern.parent, _endings(pattern.name))}"
        )


def some(names: Sequence[str]) -> str:
    """The first five."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def is_hidden(name: str) -> bool:
    """Whether a name is a system's own: .ipynb_checkpoints, @eaDir, lost+found and the like."""
    return name.startswith((".", "@", "#", "$", "__")) or name == "lost+found"


def not_taken(folder: pathlib.Path, endings: Sequence[str] = IMAGE_ENDINGS) -> str:
    """The end of a message: what else lies in a folder that there may be."""
    others = [
        entry.name + "/" * entry.is_dir()
        for entry in (_entries(folder) if folder.is_dir() else [])
        if not is_hidden(entry.name) and _ending(entry, endings) is None
    ]
    return f"; {some(others)} there are not taken, only {', '.join(endings)}" if others else ""


def _entries(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    return sorted(os.scandir(folder), key=lambda entry: entry.name)


def _endings(pattern: str) -> tuple[str, ...]:
    """Returns the endings that may follow NAME in a file's name."""
    ending = pattern.rpartition("NAME")[2]
    return IMAGE_ENDINGS if ending == ".*" else (ending,)


def _ending(entry: os.DirEntry[str], endings: Sequence[str]) -> str | None:
    """The ending of a file's name; None of a folder, a hidden file or another ending."""
    if entry.name.startswith(".") or entry.is_dir():
        return None
    return next((e for e in endings if entry.name.lower().endswith(e.lower())), None)


def _composed(name: str) -> str:
    """A name as it is compared: macOS stores an umlaut as a letter and its dots."""
    return unicodedata.normalize("NFC", name)


def _by_name(folders: Iterable[pathlib.Path], endings: tuple[str, ...]) -> dict[str, pathlib.Path]:
    """The files of folders by what their names hold before one of the endings."""
    files: dict[str, pathlib.Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        for entry in _entries(folder):
            if (ending := _ending(entry, endings)) is None:
                continue
            name = _composed(entry.name[: -len(ending)])
            if name in files:
                raise ValueError(
                    f"{folder}: {files[name].name} and {entry.name} have the same name; "
                    "rename or remove one of them"
                )
            files[name] = folder / entry.name
    return files
