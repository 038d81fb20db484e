"""Reads datasets from TensorFlow Datasets (TFDS) without TensorFlow.

A dataset must have been prepared as array_record files by `python -m dense_jax.data.prepare` or by
TFDS itself. `root` is the `data_dir` of TFDS.
"""

import functools
import io
import os
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int32

from dense_jax.data import decode, files
from dense_jax.data.source import Source


class TfdsSource(Source):
    """One split of a prepared TFDS dataset. A subclass says which one."""

    tfds_name: str
    image_key: str
    label_key: str
    name_key: str
    classes: files.Classes
    tfds_splits: ClassVar[Mapping[str, str]]  # {our split: TFDS split or slice}

    def __init__(self, root: str | os.PathLike[str], split: str):
        import tensorflow_datasets as tfds  # a slow import that few datasets need

        if split not in self.tfds_splits:
            raise ValueError(f"no split {split!r}; there are: {', '.join(self.tfds_splits)}")
        builder = tfds.builder(self.tfds_name, data_dir=root)
        command = f"python -m dense_jax.data.prepare --name={self.tfds_name} --root={root}"
        if not builder.is_prepared():
            raise ValueError(f"{builder.data_dir}: not prepared; run\n  {command}")
        formats = builder.info.available_file_formats()
        if tfds.core.FileFormat.ARRAY_RECORD not in formats:
            names = ", ".join(sorted(format.value for format in formats))
            raise ValueError(
                f"{builder.data_dir}: prepared as {names}, but reading it without TensorFlow "
                f"needs array_record; remove it or choose another root, then run\n  {command}"
            )
        skip = tfds.decode.SkipDecoding()
        self._split = self.tfds_splits[split]
        self._records: Any = builder.as_data_source(
            split=self._split,
            decoders={self.image_key: skip, self.label_key: skip},
            file_format="array_record",
        )
        self._folder = pathlib.Path(builder.data_dir)
        self._where = f"{self._folder}, {self._split}"
        self._table = decode.label_table(self.classes.values, self.classes.ignored_values)
        self.class_names, self.palette = self.classes.names, self.classes.colors()

    @classmethod
    def splits(cls, root: object) -> tuple[str, ...]:
        return tuple(cls.tfds_splits)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        record, name = self._record(i)
        where = f"{self._where}, {name}"
        image = io.BytesIO(record[self.image_key])
        image = decode.read_image(image, where, self.num_channels)
        label = io.BytesIO(record[self.label_key])
        label = decode.read_label(label, where, self._table)
        decode.check_same_size(image, label, where)
        return {"image": image, "label": label, "name": name}

    def _record(self, i: int) -> tuple[dict[str, Any], str]:
        """Returns (record i, name of the example). The images in the record are still encoded."""
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        try:
            record = self._records[i]
        except Exception as error:  # corrupt files can cause any exception
            raise ValueError(f"{self._where}, record {i}: cannot be read ({error})") from error
        return record, record[self.name_key].decode()

    @functools.cached_property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """Returns the height and width of each image in pixels, without decoding the images."""
        sizes = []
        for i in range(len(self)):
            record, name = self._record(i)
            file = io.BytesIO(record[self.image_key])
            sizes.append(decode.image_header(file, f"{self._where}, {name}")[:2])
        return np.array(sizes, np.int32)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self._record(i)[1] for i in range(len(self)))

    @functools.cached_property
    def fingerprint(self) -> str:
        paths = {path.name: path for path in sorted(self._folder.iterdir()) if path.is_file()}
        return files.fingerprint(self._split, paths)


class OxfordPets(TfdsSource):
    """The Oxford-IIIT Pet dataset (Parkhi et al. 2012), with three classes."""

    tfds_name = "oxford_iiit_pet"
    image_key, label_key, name_key = "image", "segmentation_mask", "file_name"
    num_channels = 3
    classes = files.Classes(
        names=("pet", "background", "border"),
        values=(1, 2, 3),
        palette=((230, 159, 0), (0, 0, 0), (86, 180, 233)),  # the background is black
    )
    # TFDS has no validation split, so the last tenth of the TFDS train split is held out.
    tfds_splits: ClassVar[Mapping[str, str]] = {
        "train": "train[:90%]",
        "val": "train[90%:]",
        "test": "test",
    }


TFDS_DATASETS = {"oxford_iiit_pet": OxfordPets}
