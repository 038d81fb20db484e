"""Downloads a TFDS dataset once and stores it as array_record, which training reads as it is.

    python -m dense_jax.data.prepare --name=oxford_iiit_pet --root=DIR

Needs the network. This step, and only this step, also needs TensorFlow where TFDS itself uses it
to write a dataset, as for oxford_iiit_pet: run it in an environment of its own (`pip install
tensorflow tensorflow-datasets array-record importlib_resources`), on any machine, and copy DIR.
"""

import sys

from absl import app, flags

from dense_jax.data.tfds import TFDS_DATASETS


def prepare(name: str, root: str) -> None:
    """Prepares one dataset; a RuntimeError says what was missing."""
    import tensorflow_datasets as tfds

    dataset = TFDS_DATASETS[name]
    builder = tfds.builder(dataset.tfds_name, data_dir=root, file_format="array_record")
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise RuntimeError(
            f"preparing {name} needs a package that training does not ({error}). Run this "
            "command in an environment that has it, then copy the folder here"
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
        prepare(flags.FLAGS.name, flags.FLAGS.root)
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_enum("name", None, list(TFDS_DATASETS), "Dataset.", required=True)
    flags.DEFINE_string("root", None, "Where it goes: the data_dir of TFDS.", required=True)
    app.run(main)
