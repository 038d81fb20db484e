"""Datasets as random-access sources, and batches made of them. Never uses jax.

`source.Source` is the contract. `DATASETS[name](root, split)` opens one split of a dataset, and
`DATASETS[name].splits(root)` returns the names of its splits. To add a dataset of image and label
files, add an entry to `catalog.CATALOG`. To add one of another kind, write a subclass of `Source`
and add it to `DATASETS`.
"""

from dense_jax.data.catalog import CATALOG
from dense_jax.data.folder import Folder
from dense_jax.data.records import Records
from dense_jax.data.source import Examples, Field, Source
from dense_jax.data.synthetic import Synthetic, SyntheticGray
from dense_jax.data.tfds import TFDS_DATASETS

__all__ = ["DATASETS", "Examples", "Field", "Source", "Synthetic", "open_dataset"]

DATASETS = {
    "folder": Folder,
    "records": Records,
    "synthetic": Synthetic,
    "synthetic_gray": SyntheticGray,
    **CATALOG,
    **TFDS_DATASETS,
}


def open_dataset(name: str, root: str, split: str) -> Source:
    """Opens one split of a dataset. `root` is the folder that holds its files."""
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; valid are {', '.join(DATASETS)}")
    return DATASETS[name](root, split)
