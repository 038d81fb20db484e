"""Opens datasets as random-access sources and makes batches from them. Never uses jax.

`source.Source` is the interface of a source. `DATASETS[name](root, split)` opens one split of a
dataset, and `DATASETS[name].splits(root)` returns the names of the splits. To add a dataset of
image and label files, add an entry to `catalog.CATALOG`. To add any other dataset, write a subclass
of `Source` and add the subclass to `DATASETS`.
"""

from dense_jax import storage
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
    """Opens one split of a dataset.

    root: The folder that holds the dataset's files. If it is in a bucket, the files are copied to
      the user's cache folder.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; valid are {', '.join(DATASETS)}")
    # Readers need local files. The folder of a TFDS dataset is one of many in the root.
    within = TFDS_DATASETS[name].tfds_name if name in TFDS_DATASETS else ""
    return DATASETS[name](storage.local_copy(root, within), split)
