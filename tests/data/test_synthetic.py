"""Tests that the synthetic dataset is deterministic and shows every class in every split."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from dense_jax import data
from dense_jax.data.synthetic import NUM_EXAMPLES, Synthetic


def counts(source) -> np.ndarray:
    return sum(np.bincount(source[i]["label"].ravel(), minlength=6) for i in range(len(source)))


def test_an_example_depends_on_split_and_number_alone():
    a, b = Synthetic("", "train"), pickle.loads(pickle.dumps(Synthetic("elsewhere", "train")))
    a[5], a[0]  # what was read before does not matter
    for i in (3, 255):
        for key in ("image", "label"):
            np.testing.assert_array_equal(a[i][key], b[i][key])
    assert (a[3]["image"] != a[4]["image"]).any()
    assert (a[3]["image"] != Synthetic("", "val")[3]["image"]).any()


def test_another_process_makes_the_same_example():
    code = (
        "from dense_jax.data.synthetic import Synthetic; import sys;"
        "sys.stdout.buffer.write(Synthetic('', 'test')[7]['image'].tobytes())"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert made == Synthetic("", "test")[7]["image"].tobytes()


@pytest.mark.parametrize("split", NUM_EXAMPLES)
def test_each_split_holds_every_class_and_few_specks(split):
    source = Synthetic("", split, num_examples=20)
    pixels = counts(source)
    assert (pixels > 0).all()
    assert 0.001 < pixels[source.class_names.index("speck")] / pixels.sum() < 0.01


@pytest.mark.parametrize("name, num_channels", [("synthetic", 3), ("synthetic_gray", 1)])
def test_registered_forms(name, num_channels):
    source = data.open_dataset(name, "", "val")
    assert (source.num_channels, source.num_classes, len(source)) == (num_channels, 6, 64)
    assert source[0]["image"].shape == (96, 96, num_channels)
    np.testing.assert_array_equal(source.sizes, np.full((64, 2), 96))
    assert source.names[63] == source[63]["name"]


@pytest.mark.parametrize("size", [(1, 1), (37, 53), (1, 200), (130, 260)])
def test_any_size(size):
    source = Synthetic("", "train", size=size, num_examples=2)
    example = source[1]
    assert example["image"].shape == (*size, 3) and example["image"].dtype == np.uint8
    assert example["label"].shape == size and example["label"].dtype == np.int32
    assert set(np.unique(example["label"])) <= set(range(6))


def test_no_class_can_be_told_by_one_pixel():
    """The best guess from a pixel's color alone, in 4096 bins, is poor on most classes."""
    table = np.zeros(4096 * 6)
    for example in Synthetic("", "train", num_examples=20):
        bins = example["image"].astype(int) // 16 @ [256, 16, 1]
        table += np.bincount((bins * 6 + example["label"]).ravel(), minlength=4096 * 6)
    table = table.reshape(4096, 6)
    guess = table.argmax(axis=1)
    right = np.array([table[guess == c, c].sum() for c in range(6)])
    guessed = np.array([table[guess == c].sum() for c in range(6)])
    assert np.mean(right / (guessed + table.sum(axis=0) - right)) < 0.5


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(ValueError, match=r"no split 'trian'; there are: train, val, test"):
        Synthetic("", "trian")
    with pytest.raises(ValueError, match=r"unknown dataset 'sinthetic'.*folder.*synthetic"):
        data.open_dataset("sinthetic", "", "train")
