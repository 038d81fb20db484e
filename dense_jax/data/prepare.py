"""Stores a dataset as array_record files, which training reads by random access.

    python -m dense_jax.data.prepare --name=oxford_iiit_pet --root=DIR
    python -m dense_jax.data.prepare --name=NAME --root=DIR --output=RECORDS [--max_side=PIXELS]

The first command downloads a TFDS dataset to DIR. For some datasets, such as oxford_iiit_pet, TFDS
needs TensorFlow, which no other command needs. If TensorFlow is not installed, run the command in a
separate environment (`pip install tensorflow tensorflow-datasets array-record importlib_resources`)
on any machine, and copy DIR.

The second command copies any dataset to RECORDS. TFDS datasets are downloaded first. Open the copy
with `--config.data.name=records --config.data.root=RECORDS`. The copied examples are bitwise equal
to the originals, except that `--max_side` shrinks examples whose longer side exceeds PIXELS. If the
command is interrupted, run it again. Complete splits are kept.
"""

import contextlib
import pathlib
import shutil
from concurrent import futures
from typing import Any

import cv2
import numpy as np
import tqdm
from absl import flags
from array_record.python import array_record_module

from dense_jax import command, data, regions, storage
from dense_jax.data import folds, records
from dense_jax.data.tfds import TFDS_DATASETS

_NUM_AT_ONCE = 64  # the number of examples in memory at a time


def prepare(name: str, root: str) -> None:
    """Downloads and prepares a TFDS dataset. Raises OSError on failure."""
    import tensorflow_datasets as tfds

    dataset = TFDS_DATASETS[name]
    builder = tfds.builder(dataset.tfds_name, data_dir=root, file_format="array_record")
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise OSError(
            f"preparing {name} needs a package that training does not ({error}). Run this "
            "command in an environment that has it, then copy the folder here"
        ) from error
    except Exception as error:  # network errors are of too many types to list
        raise OSError(
            f"{name} could not be downloaded and prepared in {root}: "
            f"{type(error).__name__}: {error}. This step needs the network"
        ) from error
    print(f"{name} is ready: --config.data.name={name} --config.data.root={root}")


def copy(name: str, root: str, output: str, max_side: int | None = None) -> None:
    """Writes every split of a dataset to `output` as records. Keeps splits that already exist.

    Raises ValueError if an example is invalid or if `output` holds another dataset.

    max_side: The maximum length of the longer side, in pixels. Larger examples are shrunk.
    """
    sources = {
        split: data.open_dataset(name, root, split) for split in data.DATASETS[name].splits(root)
    }
    if not sources:
        raise ValueError(f"{root}: no splits")
    _claim(pathlib.Path(output), _description(name, sources, max_side))
    groups, copied = (pathlib.Path(folder) / folds.GROUPS for folder in (root, output))
    if root and groups.exists() and not copied.exists():
        shutil.copy(groups, copied)
    for split, source in sources.items():
        path = records.path_of(output, split)
        if not path.exists():
            # storage.atomic does not fit because the writer opens the path itself. Also, the next
            # run must overwrite the temporary file of an interrupted run, which may be large.
            unfinished = path.with_name(f"{path.name}.unfinished")
            _write(source, unfinished, split, max_side)
            unfinished.replace(path)
    print(f"{output} is ready: --config.data.name=records --config.data.root={output}")


def _description(
    name: str, sources: dict[str, data.Source], max_side: int | None
) -> dict[str, Any]:
    source = next(iter(sources.values()))
    return {
        "classes": list(source.class_names),
        "palette": None if source.palette is None else source.palette.tolist(),
        "regions": regions.declaration(source),
        "num_channels": source.num_channels,
        "dtype": source.dtype,
        "value_range": source.value_range and list(source.value_range),
        "prepared_from": {"name": name, "max_side": max_side},
        "format_version": records.VERSION,
        "splits": {
            split: {
                "num_examples": len(source),
                "has_instances": source.has_instances,
                "fingerprint": source.fingerprint,
            }
            for split, source in sources.items()
        },
    }


def _claim(output: pathlib.Path, description: dict[str, Any]) -> None:
    """Writes dataset.json unless it exists. Raises ValueError if `output` holds another dataset."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "dataset.json"
    if path.exists():
        if records.describe(output) != description:
            raise ValueError(
                f"{output} holds another dataset, or this one as it was before its files or "
                "max_side changed; remove it or choose another output"
            )
    elif any(path.suffix != ".tmp" for path in output.iterdir()):
        raise ValueError(f"{output} holds files of something else; choose another output")
    else:
        storage.write_json(path, description)


def _write(source: data.Source, path: pathlib.Path, split: str, max_side: int | None) -> None:
    def pack(i: int) -> bytes:
        example = source[i]
        if source.has_instances:
            example["instances"] = source.instances(i)
        return records.pack(shrink(example, max_side) if max_side else example)

    # Each chunk holds one record, so that reading a record does not decode any others.
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    with (
        contextlib.closing(writer),
        futures.ThreadPoolExecutor() as pool,
        tqdm.tqdm(total=len(source), desc=split, disable=None) as bar,
    ):
        for start in range(0, len(source), _NUM_AT_ONCE):
            stop = min(start + _NUM_AT_ONCE, len(source))
            for record in pool.map(pack, range(start, stop)):
                writer.write(record)
                bar.update()


def shrink(example: dict[str, Any], max_side: int) -> dict[str, Any]:
    """Shrinks an example so that its longer side has at most `max_side` pixels.

    Pixels of images are averaged over areas. Labels and instances are of the nearest neighbor.
    """
    height, width = example["label"].shape
    longer = max(height, width)
    if longer <= max_side:
        return example
    size = [max(1, round(length * max_side / longer)) for length in (width, height)]
    shrunk = dict(example)
    for key in {"label", "instances"} & example.keys():
        shrunk[key] = cv2.resize(example[key], size, interpolation=cv2.INTER_NEAREST_EXACT)
    channels = np.moveaxis(example["image"], -1, 0)
    areas = [cv2.resize(channel, size, interpolation=cv2.INTER_AREA) for channel in channels]
    shrunk["image"] = np.stack(areas, axis=-1)
    return shrunk


def main(argv: list[str]) -> None:
    name, root, output = flags.FLAGS.name, flags.FLAGS.root, flags.FLAGS.output
    if output is None and (name not in TFDS_DATASETS or flags.FLAGS.max_side):
        raise ValueError("--output is missing: the folder to write the records to")
    if name in TFDS_DATASETS:
        prepare(name, root)
    if output is not None:
        copy(name, root, output, flags.FLAGS.max_side)


if __name__ == "__main__":
    flags.DEFINE_enum("name", None, list(data.DATASETS), "Dataset.", required=True)
    command.define_folder(
        "root", "The folder that holds the dataset's files; for TFDS, the data_dir.", required=True
    )
    command.define_folder("output", "The folder to write the records to.")
    flags.DEFINE_integer(
        "max_side", None, "The maximum length of the longer side, in pixels.", lower_bound=1
    )
    command.run(main)
