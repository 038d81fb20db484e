"""Datasets as random-access sources, and batches made of them. Never imports jax.

A source is one split of a dataset. It is cheap to make, can be pickled (worker processes get a
copy), and reads an example when asked for it; `Source` lists what it has. An entry of `DATASETS`
is called as `(root, split)` and has `splits(root)`, the names of the splits. To add a dataset,
write it and add one line to `DATASETS`.
"""

from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32, UInt8

from dense_jax.data import folder, synthetic, tfds


class Source(Protocol):
    """One split: `source[i]` is {"image": uint8 [h, w, c], "label": int32 [h, w], "name": str}.

    c is `num_channels` for every example; labels are in [0, num_classes) or IGNORE_LABEL.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> dict[str, Any]: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def num_channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        ...

    @property
    def palette(self) -> UInt8[np.ndarray, "num_classes 3"] | None:
        """RGB of each class in pictures, if the dataset has its own."""
        ...

    @property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """Height and width of each example, in pixels."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """Hex digest that changes when the files do; None for data that is not read from files."""
        ...


DATASETS = {
    "folder": folder.Folder,
    "synthetic": synthetic.Synthetic,
    "synthetic_grey": synthetic.SyntheticGrey,
    **tfds.DATASETS,
}


def open_dataset(name: str, root: str, split: str) -> Source:
    """Opens one split of the dataset `name`; `root` is the folder that holds its files."""
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; valid are {', '.join(DATASETS)}")
    return DATASETS[name](root, split)
