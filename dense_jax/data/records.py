"""Reads and writes datasets in the format of `dense_jax.data.prepare`, in a folder ROOT.

    ROOT/dataset.json            the description and the origin of the dataset
    ROOT/SPLIT.array_record      the examples of a split, for random access

A record is a msgpack map of `name`, `size` (height and width in pixels), `image`, `label` and, if
the split has instances, `instances`. The arrays are PNG-encoded. Labels hold class indices, or 255
for ignored pixels. An 8-bit image with neither 1 nor 3 channels is stored as gray [h, w * c], and an
image that is not 8-bit as its bytes, gray [h, w * bytes per pixel].
"""

import functools
import io
import os
import pathlib
from typing import Any

import msgpack
import numpy as np
from array_record.python import array_record_data_source
from jaxtyping import Int32
from PIL import Image

from dense_jax import regions, storage
from dense_jax.data import files
from dense_jax.data.source import Source

VERSION = 1  # of the format, increased if older readers cannot read new files


def pack(example: dict[str, Any]) -> bytes:
    """Encodes an example as a record, losslessly."""
    image, label = example["image"], example["label"]
    height, width = label.shape
    is_rgb = image.dtype == np.uint8 and image.shape[2] == 3
    flat = np.ascontiguousarray(image).reshape(height, -1)
    record = {
        "name": example["name"],
        "size": (height, width),
        "image": _to_png(image if is_rgb else flat.view(np.uint8)),
        "label": _to_png(label.astype(np.uint8)),
    }
    if "instances" in example:
        record["instances"] = _to_png(example["instances"].astype(np.uint16))
    return msgpack.packb(record)  # type: ignore[bad-return]


def describe(root: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the contents of dataset.json in a prepared dataset."""
    path = pathlib.Path(root) / "dataset.json"
    description = files.read_json(path, f"data.prepare --output={root} writes it")
    if not isinstance(description, dict) or "prepared_from" not in description:
        raise ValueError(
            f"{path}: not written by data.prepare (a folder of images is --name=folder)"
        )
    storage.check_format(path, description, VERSION)
    return description


def path_of(root: str | os.PathLike[str], split: str) -> pathlib.Path:
    """Returns the path of the file with a split's examples."""
    return pathlib.Path(root) / f"{split}.array_record"


class Records(Source):
    """One split of a prepared dataset. See the module docstring."""

    def __init__(self, root: str | os.PathLike[str], split: str):
        description = describe(root)
        if split not in (splits := description["splits"]):
            raise ValueError(f"{root}: no split {split!r}; there are: {', '.join(splits)}")
        self._path = path_of(root, split)
        self._way_out = f"remove it and run again what prepared {root}"
        if not self._path.is_file():
            raise ValueError(f"{self._path}: no such file; run again what prepared {root}")
        try:
            self._records = array_record_data_source.ArrayRecordDataSource(str(self._path))
        except Exception as error:  # corrupt files can cause any exception
            raise ValueError(f"{self._path}: cannot be read ({error}); {self._way_out}") from error
        self.class_names = tuple(description["classes"])
        self.num_channels = description["num_channels"]
        self.dtype = description["dtype"]
        self.value_range = description["value_range"]
        self.regions = regions.read(self.class_names, description.get("regions"))
        if description["palette"]:
            self.palette = np.array(description["palette"], np.uint8)
        self.has_instances = splits[split]["has_instances"]

    @staticmethod
    def splits(root: str | os.PathLike[str]) -> tuple[str, ...]:
        return tuple(describe(root)["splits"])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        record = self._record(i)
        image = _from_png(record["image"]).view(self.dtype)
        image = image.reshape(*record["size"], self.num_channels)
        label = _from_png(record["label"]).astype(np.int32)
        return {"image": image, "label": label, "name": record["name"]}

    def instances(self, i: int) -> Int32[np.ndarray, "h w"]:
        return _from_png(self._record(i)["instances"]).astype(np.int32)

    def _record(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        try:
            return msgpack.unpackb(self._records[i])
        except Exception as error:  # corrupt files can cause any exception
            raise ValueError(
                f"{self._path}, record {i}: cannot be read ({error}); {self._way_out}"
            ) from error

    @functools.cached_property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """Returns the height and width of each image in pixels, without decoding the images."""
        return np.array([self._record(i)["size"] for i in range(len(self))], np.int32)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self._record(i)["name"] for i in range(len(self)))

    @functools.cached_property
    def fingerprint(self) -> str:
        about = (self._path.parent / "dataset.json").read_text()
        return files.fingerprint(about, {self._path.name: self._path})


def _to_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)  # 4 times as fast, 10 % larger
    return file.getvalue()


def _from_png(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)))
