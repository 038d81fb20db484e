"""Tests that prepared datasets return the same examples, even after an interruption."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dense_jax import data
from dense_jax.data import prepare, records, verify
from dense_jax.data.folder import Folder
from dense_jax.data.records import Records
from dense_jax.data.synthetic import Synthetic
from dense_jax.data.targets import with_border_weights
from dense_jax.labels import IGNORE_LABEL


@pytest.fixture
def color_folder(tmp_path):
    """Color images, one of them a JPEG, with a palette, odd raw values and instances."""
    root = tmp_path / "folder"
    rng = np.random.default_rng(0)
    for split, names in {"train": ["a.png", "b.jpg", "c.webp"], "val": ["d.png"]}.items():
        for k, name in enumerate(names):
            size = (5 + k, 20 - 3 * k)
            kinds = {
                "images": rng.integers(0, 256, (*size, 3), np.uint8),
                "labels": rng.choice(np.array([0, 7, 255], np.uint8), size),
                "instances": rng.choice(np.array([0, 1, 300, 65535], np.uint16), size),
            }
            for kind, pixels in kinds.items():
                path = root / kind / split / name
                path = path if kind == "images" else path.with_suffix(".png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    options = {"classes": ["sky", "road"], "values": [255, 0], "ignored_values": [7]}
    options["palette"] = [[1, 2, 3], [200, 100, 50]]
    (root / "dataset.json").write_text(json.dumps(options))
    return root


@pytest.fixture
def prepared(tiny_folder, tmp_path):
    prepare.copy("folder", str(tiny_folder), str(tmp_path / "records"))
    return tmp_path / "records"


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for key in ("class_names", "num_classes", "num_channels", "dtype"):
        assert getattr(found, key) == getattr(expected, key)
    np.testing.assert_array_equal(found.palette, expected.palette)
    np.testing.assert_array_equal(found.sizes, expected.sizes)
    assert found.sizes.dtype == np.int32
    assert found.names == expected.names == tuple(example["name"] for example in expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and one["name"] == other["name"]
        for key in ("image", "label"):
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key])


def test_gray_examples_come_back_as_they_were(tiny_folder, prepared):
    assert Records.splits(prepared) == ("test", "train", "val")
    for split in Records.splits(prepared):
        found = data.open_dataset("records", str(prepared), split)
        assert_equal(pickle.loads(pickle.dumps(found)), Folder(tiny_folder, split))
    assert not list(prepared.glob("*.unfinished"))


def test_colors_palette_values_and_instances_come_back(color_folder, tmp_path):
    prepare.copy("folder", str(color_folder), str(tmp_path / "records"))
    for split in ("train", "val"):
        found = Records(tmp_path / "records", split)
        expected = Folder(color_folder, split)
        assert_equal(found, expected)
        assert found.has_instances
        bordered = [
            with_border_weights(source, weight=10.0, sigma=5.0, classes=None)
            for source in (found, expected)
        ]
        for i in range(len(found)):
            assert found.instances(i).dtype == np.int32
            np.testing.assert_array_equal(found.instances(i), expected.instances(i))
            np.testing.assert_array_equal(*[source[i]["border"] for source in bordered])


class FiveChannels(Synthetic):
    """Two scenes a split, each with five channels."""

    def __init__(self, root, split):
        super().__init__(root, split, num_examples=2, size=(9, 11))
        self.num_channels = 5

    def __getitem__(self, i):
        example = super().__getitem__(i)
        image = np.concatenate([example["image"], 255 - example["image"][..., :2]], axis=-1)
        return dict(example, image=image)


@pytest.mark.parametrize("max_side", [None, 6])
def test_any_number_of_channels(tmp_path, monkeypatch, max_side):
    monkeypatch.setitem(data.DATASETS, "five", FiveChannels)
    prepare.copy("five", "", str(tmp_path), max_side)
    found = Records(tmp_path, "val")
    if max_side is None:
        assert_equal(found, FiveChannels("", "val"))
    else:
        assert found[1]["image"].shape == (5, 6, 5)
        np.testing.assert_allclose(
            found[1]["image"][..., 3:], 255.0 - found[1]["image"][..., :2], atol=1
        )


def test_past_the_end_is_an_index_error(prepared):
    for i in (-1, 3):
        with pytest.raises(IndexError, match="of 3"):
            Records(prepared, "val")[i]


def test_sizes_need_no_decoding(prepared, tiny_folder, monkeypatch):
    expected = Folder(tiny_folder, "train").sizes
    monkeypatch.setattr(Image, "open", None)
    np.testing.assert_array_equal(Records(prepared, "train").sizes, expected)


def test_the_fingerprint_follows_split_and_files(prepared, tmp_path):
    def fingerprint(split):
        return Records(prepared, split).fingerprint

    before = fingerprint("train")
    assert before == fingerprint("train") != fingerprint("val")
    shutil.copytree(prepared, tmp_path / "copy")
    assert before == Records(tmp_path / "copy", "train").fingerprint
    path = prepared / "dataset.json"
    path.write_text(path.read_text() + " ")
    assert before != fingerprint("train")


def test_goes_on_after_an_interruption(tiny_folder, tmp_path, monkeypatch):
    output = tmp_path / "records"
    pack, packed = records.pack, []

    def die(example):
        if len(packed) == 9:  # of 5 test, 7 train and 3 val examples
            raise KeyboardInterrupt
        packed.append(example["name"])
        return pack(example)

    monkeypatch.setattr(records, "pack", die)
    monkeypatch.setattr(prepare, "_NUM_AT_ONCE", 2)
    with pytest.raises(KeyboardInterrupt):
        prepare.copy("folder", str(tiny_folder), str(output))
    assert sorted(path.name for path in output.iterdir()) == [
        "dataset.json", "test.array_record", "train.array_record.unfinished",
    ]  # fmt: skip
    finished = (output / "test.array_record").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"train.array_record: no such file; run again"):
        Records(output, "train")

    monkeypatch.setattr(records, "pack", pack)
    prepare.copy("folder", str(tiny_folder), str(output))
    assert (output / "test.array_record").stat().st_mtime_ns == finished
    for split in ("train", "val", "test"):
        assert_equal(Records(output, split), Folder(tiny_folder, split))


def test_starts_over_where_only_dataset_json_was_begun(tiny_folder, tmp_path):
    (tmp_path / ".dataset.json.0123.tmp").write_text('{"clas')
    prepare.copy("folder", str(tiny_folder), str(tmp_path))
    assert len(Records(tmp_path, "val")) == 3


def test_never_overwrites_anything_else(tiny_folder, color_folder, prepared, tmp_path):
    def copy(root, output, **options):
        prepare.copy("folder", str(root), str(output), **options)

    before = {path: path.read_bytes() for path in prepared.iterdir()}
    for root, options in [(color_folder, {}), (tiny_folder, {"max_side": 8})]:
        with pytest.raises(ValueError, match="records holds another dataset, or this one as it"):
            copy(root, prepared, **options)
    assert before == {path: path.read_bytes() for path in prepared.iterdir()}

    with pytest.raises(ValueError, match=r"not written by data.prepare"):
        copy(tiny_folder, color_folder)
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="no splits"):
        copy(tmp_path, tmp_path / "other")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(ValueError, match="photos holds files of something else"):
        copy(tiny_folder, tmp_path / "photos")


def test_refuses_to_go_on_once_the_files_have_changed(color_folder, tmp_path):
    prepare.copy("folder", str(color_folder), str(tmp_path / "records"))
    prepare.copy("folder", str(color_folder), str(tmp_path / "records"))  # nothing left to do
    path = color_folder / "labels" / "val" / "d.png"
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(ValueError, match="before its files or max_side changed"):
        prepare.copy("folder", str(color_folder), str(tmp_path / "records"))


def test_a_bad_example_stops_it_and_leaves_no_split(color_folder, tmp_path):
    (color_folder / "labels" / "train" / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"labels/train/b.png: not a readable image"):
        prepare.copy("folder", str(color_folder), str(tmp_path / "records"))
    assert not list((tmp_path / "records").glob("*.array_record"))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_one_clear_error(prepared, keep):
    path = prepared / "train.array_record"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"records/train.array_record: cannot be read .*remove it"):
        Records(prepared, "train")


def test_spoilt_bytes_are_one_clear_error(prepared):
    path = prepared / "train.array_record"
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train.array_record, record 0: cannot be read .*remove"):
        verify.verify(Records(prepared, "train"))


def test_another_version_of_the_format_is_refused(prepared):
    path = prepared / "dataset.json"
    description = json.loads(path.read_text())
    assert description["format_version"] == 1
    path.write_text(json.dumps(description | {"format_version": 2}))
    with pytest.raises(ValueError, match=r"records/dataset.json has version 2 of its format"):
        data.open_dataset("records", str(prepared), "train")


def test_what_is_missing_is_named(prepared, tmp_path):
    with pytest.raises(ValueError, match="no split 'dev'; there are: test, train, val"):
        Records(prepared, "dev")
    with pytest.raises(ValueError, match=r"nowhere/dataset.json: no such file; data.prepare"):
        Records(tmp_path / "nowhere", "train")
    (prepared / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset.json: not valid JSON"):
        Records(prepared, "train")


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_that_are_not_8_bit_come_back_with_all_their_values(
    color_folder, tmp_path, dtype, channels
):
    rng = np.random.default_rng(0)
    for path in (color_folder / "images").glob("*/*"):
        with Image.open(path) as image:
            size = image.height, image.width, channels
        np.save(path.with_suffix(".npy"), rng.normal(3e4, 9e3, size).clip(0, 6e4).astype(dtype))
        path.unlink()
    prepare.copy("folder", str(color_folder), str(tmp_path / "records"))
    found = Records(tmp_path / "records", "train")
    assert_equal(found, Folder(color_folder, "train"))
    assert found.dtype == np.dtype(dtype).name and found.num_channels == channels
    example = found[0]
    shrunk = prepare.shrink(example, 7)["image"]
    assert shrunk.dtype == dtype and shrunk.shape[2] == channels
    low, high = (function(example["image"], axis=(0, 1)) for function in (np.min, np.max))
    assert (shrunk >= low).all() and (shrunk <= high).all() and len(np.unique(shrunk)) > 5


def test_shrinking_keeps_labels_and_brightness_in_place():
    label = np.kron([[0, 3], [IGNORE_LABEL, 9]], np.ones((20, 30))).astype(np.int32)
    image = (20 + 20 * (label[..., None] % 11)).astype(np.uint8).repeat(3, axis=2)
    example = {"image": image, "label": label, "instances": label * 100, "name": "a"}
    found = prepare.shrink(example, 30)
    assert found["label"].shape == (20, 30) and found["image"].shape == (20, 30, 3)
    expected = np.kron([[0, 3], [IGNORE_LABEL, 9]], np.ones((10, 15)))
    np.testing.assert_array_equal(found["label"], expected)
    np.testing.assert_array_equal(found["instances"], expected * 100)
    assert found["image"].dtype == np.uint8 and found["label"].dtype == np.int32
    apart = np.abs(found["image"].astype(int) - (20 + 20 * (expected[..., None] % 11)))
    apart[9:11] = apart[:, 14:16] = 0  # the borders, which antialiasing mixes
    assert not apart.any()


@pytest.mark.parametrize("size", [(1, 1), (7, 50), (50, 7), (33, 34), (101, 3)])
@pytest.mark.parametrize("max_side", [1, 10, 49, 1000])
def test_shrinking_invents_no_label_and_no_brightness(size, max_side):
    rng = np.random.default_rng(0)
    label = rng.choice(np.array([0, 5, IGNORE_LABEL], np.int32), size)
    image = rng.integers(100, 120, (*size, 1), np.uint8)
    found = prepare.shrink({"image": image, "label": label, "name": "a"}, max_side)
    assert set(np.unique(found["label"])) <= set(np.unique(label))
    assert image.min() <= found["image"].min() and found["image"].max() <= image.max()
    assert found["image"].shape[:2] == found["label"].shape
    if max(size) <= max_side:
        np.testing.assert_array_equal(found["image"], image)
        np.testing.assert_array_equal(found["label"], label)
    else:
        assert max(found["label"].shape) == max_side


def test_the_command(tiny_folder, tmp_path):
    command = [sys.executable, "-m", "dense_jax.data.prepare", "--name=folder"]
    command += [f"--root={tiny_folder}", f"--output={tmp_path}/records", "--max_side=8"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"--config.data.name=records --config.data.root={tmp_path}/records" in done.stdout
    assert Records(tmp_path / "records", "val").sizes.max() == 8
