"""Tests reading TFDS datasets without TensorFlow, on a tiny dataset in the layout of TFDS."""

import io
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dense_jax import class_colors
from dense_jax.data import open_dataset


def encoded(pixels: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.seek(0)
    return file


def pet(i: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(i)
    return {
        "image": rng.integers(0, 256, (3 + i, 5, 3), np.uint8),
        "segmentation_mask": rng.integers(1, 4, (3 + i, 5), np.uint8),
    }


class Pets(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Twenty train pets, two test pets, with the features of the real dataset that we use."""

    name = "oxford_iiit_pet"
    VERSION = tfds.core.Version("4.0.0")
    code_path = None  # TFDS would look for files beside this module

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "file_name": tfds.features.Text(),
                    "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(0, 20),
            "test": self._generate_examples(20, 22),
        }

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            files = {key: encoded(pixels) for key, pixels in pet(i).items()}
            yield str(i), {"file_name": f"pet{i}.jpg", **files}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    Pets(data_dir=root, file_format="array_record").download_and_prepare()
    return root


@pytest.fixture
def copy(root, tmp_path):
    """A copy that a test may spoil, and the folder of its files."""
    shutil.copytree(root, tmp_path / "tfds")
    return tmp_path / "tfds", tmp_path / "tfds" / "oxford_iiit_pet" / "4.0.0"


def test_splits_cover_the_data_once(root):
    names = {
        split: [example["name"] for example in open_dataset("oxford_iiit_pet", str(root), split)]
        for split in ("train", "val", "test")
    }
    assert {split: len(found) for split, found in names.items()} == {
        "train": 18, "val": 2, "test": 2,
    }  # fmt: skip
    assert sorted(names["train"] + names["val"]) == sorted(f"pet{i}.jpg" for i in range(20))


def test_reads_what_was_written(root):
    source = pickle.loads(pickle.dumps(open_dataset("oxford_iiit_pet", str(root), "train")))
    assert source.class_names == ("pet", "background", "border")
    assert (source.num_classes, source.num_channels) == (3, 3)
    assert sorted(source.palette.tolist()) == sorted(class_colors.default_palette(3).tolist())
    for example, name, size in zip(source, source.names, source.sizes, strict=True):
        assert example["name"] == name
        written = pet(int(example["name"].removeprefix("pet").removesuffix(".jpg")))
        np.testing.assert_array_equal(example["image"], written["image"])
        np.testing.assert_array_equal(example["label"], written["segmentation_mask"] - 1)
        assert example["label"].dtype == np.int32
        assert tuple(size) == example["label"].shape


def test_fingerprint_follows_split_and_files(copy):
    root, folder = copy

    def fingerprint(split):
        return open_dataset("oxford_iiit_pet", str(root), split).fingerprint

    before = fingerprint("train")
    assert before == fingerprint("train") != fingerprint("val")
    (folder / "features.json").touch()
    assert before == fingerprint("train")
    (folder / "features.json").write_text((folder / "features.json").read_text() + " ")
    assert before != fingerprint("train")


def test_unknown_split(root):
    with pytest.raises(ValueError, match="no split 'validation'; there are: train, val, test"):
        open_dataset("oxford_iiit_pet", str(root), "validation")


def test_not_prepared_names_the_command(tmp_path):
    command = f"python -m dense_jax.data.prepare --name=oxford_iiit_pet --root={tmp_path}"
    with pytest.raises(ValueError, match="not prepared") as error:
        open_dataset("oxford_iiit_pet", str(tmp_path), "train")
    assert str(error.value).endswith(command)


def test_another_file_format_names_the_command(copy):
    root, folder = copy
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="prepared as tfrecord") as error:
        open_dataset("oxford_iiit_pet", str(root), "train")
    assert f"dense_jax.data.prepare --name=oxford_iiit_pet --root={root}" in str(error.value)


@pytest.mark.parametrize("spoil", ["truncate", "remove"])
def test_spoilt_files_are_named(copy, spoil):
    root, folder = copy
    (records,) = folder.glob("*train*")
    if spoil == "remove":
        records.unlink()
    else:
        records.write_bytes(records.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="oxford_iiit_pet"):
        list(open_dataset("oxford_iiit_pet", str(root), "train"))


def test_other_datasets_do_not_wait_for_tfds():
    code = "import sys, dense_jax.data; sys.exit('tensorflow_datasets' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensorflow_is_not_loaded(root):
    open_dataset("oxford_iiit_pet", str(root), "test")[0]
    assert "tensorflow" not in sys.modules
