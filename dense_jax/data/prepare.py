"""Downloads a TFDS dataset once and stores it as array_record, which training reads as it is.

    python -m dense_jax.data.prepare --name=oxford_iiit_pet --root=DIR

Needs the network. Some datasets also need TensorFlow for this step, and only for this step: run
it in an environment of its own (`pip install tensorflow tensorflow-datasets array-record`), on
any machine, and copy DIR.
"""

import sys

from absl import app, flags

from dense_jax.data import tfds as catalogue

_NAME = flags.DEFINE_enum("name", None, list(catalogue.DATASETS), "Dataset.")
_ROOT = flags.DEFINE_string("root", None, "Where prepared datasets go: the data_dir of TFDS.")


def prepare(name: str, root: str) -> None:
    """Prepares one dataset; a RuntimeError says what was missing."""
    import tensorflow_datasets as tfds

    dataset = catalogue.DATASETS[name]
    builder = tfds.builder(dataset.tfds_name, data_dir=root, file_format="array_record")
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise RuntimeError(
            f"preparing {name} needs TensorFlow ({error}). Training does not: run this command in "
            "an environment with tensorflow, tensorflow-datasets and array-record, then copy "
            f"{root}"
        ) from error
    except Exception as error:  # the network fails in more ways than can be listed
        raise RuntimeError(
            f"{name} could not be downloaded and prepared in {root}: "
            f"{type(error).__name__}: {error}. This step needs the network"
        ) from error
    print(f"{name} is ready: --config.data.name={name} --config.data.root={root}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        prepare(_NAME.value, _ROOT.value)
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required([_NAME, _ROOT])
    app.run(main)
