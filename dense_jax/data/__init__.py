"""Datasets as random-access sources, and batches made of them. Never uses jax.

A source is one split of a dataset. It is cheap to make, reads an example when asked for it, and
can be pickled, because worker processes get a copy. Every source has
    len(source)
    source[i]      {"image": uint8 [h, w, c], "label": int32 [h, w], "name": str} with labels in
                   [0, num_classes) or IGNORE_LABEL; c is num_channels for every i
    num_classes    int
    class_names    tuple of str
    num_channels   1 (gray), 3 (RGB) or any other number
    values         the raw value, or values, of each class in label files, or None
    value_range    what became 0 and 255 in images that are not of 8 bits, or None
    palette        uint8 [num_classes, 3], RGB of each class in pictures, or None
    sizes          int32 [n, 2], height and width of each example in pixels
    names          tuple of str, the name of each example
    fingerprint    hex digest that changes when the files do, the same for their copies; None for
                   data not read from files

An entry of `DATASETS` is called as `(root, split)` and has `splits(root)`, the names of the
splits. To add a dataset of image and label files, add an entry to `catalog.CATALOG`; to add one
of another kind, write its source and add it to `DATASETS` and `Source`.
"""

from typing import NamedTuple, TypeGuard

from dense_jax.data.catalog import CATALOG
from dense_jax.data.files import Files
from dense_jax.data.folder import Folder
from dense_jax.data.records import Records
from dense_jax.data.synthetic import Synthetic, SyntheticGray
from dense_jax.data.tfds import TFDS_DATASETS, TfdsSource

Source = Files | Records | Synthetic | TfdsSource


class Field(NamedTuple):
    """A per-pixel array [h, w] that examples hold beside image and label."""

    name: str
    dtype: str = "float32"
    fill: float = 0.0
    interpolation: str = "bilinear"


DATASETS = {
    "folder": Folder,
    "records": Records,
    "synthetic": Synthetic,
    "synthetic_gray": SyntheticGray,
    **CATALOG,
    **TFDS_DATASETS,
}


def has_instances(source: Source) -> TypeGuard[Folder | Records]:
    """Whether `source.instances(i)` tells the object, int32 [h, w], that each pixel belongs to."""
    return isinstance(source, Folder | Records) and source.has_instances


def open_dataset(name: str, root: str, split: str) -> Source:
    """Opens one split of the dataset `name`; `root` is the folder that holds its files."""
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; valid are {', '.join(DATASETS)}")
    return DATASETS[name](root, split)
