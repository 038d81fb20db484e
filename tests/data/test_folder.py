"""Tests how folder datasets are read, and that each mistake gives one clear error."""

import io
import json
import math
import os
import pathlib
import pickle
import shutil
import time
import unicodedata

import numpy as np
import pytest
import tifffile
from PIL import Image

from dense_jax.data import decode, doctor, files, open_dataset, prepare, verify
from dense_jax.data.folder import Folder
from dense_jax.labels import IGNORE_LABEL

CLASSES = ["sky", "road"]


def save(path: pathlib.Path, pixels, mode=None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(path, **options)


def write_options(root: pathlib.Path, **options) -> None:
    (root / "dataset.json").write_text(json.dumps({"classes": CLASSES, **options}))


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """A good dataset: three train images of different sizes, one val image."""
    rng = np.random.default_rng(0)
    for split, name, size in [
        ("train", "b", (4, 6)),
        ("train", "a", (5, 3)),
        ("train", "c", (1, 1)),
        ("val", "v", (2, 2)),
    ]:
        save(tmp_path / "images" / split / f"{name}.png", rng.integers(0, 256, (*size, 3), "uint8"))
        save(tmp_path / "labels" / split / f"{name}.png", rng.integers(0, 2, size, "uint8"))
    write_options(tmp_path)
    return tmp_path


def test_reads_what_was_written(root):
    source = open_dataset("folder", str(root), "train")
    assert tuple(example["name"] for example in source) == source.names == ("a", "b", "c")
    assert source.class_names == ("sky", "road")
    assert (source.num_classes, source.num_channels, source.palette) == (2, 3, None)
    np.testing.assert_array_equal(source.sizes, [[5, 3], [4, 6], [1, 1]])
    for example in source:
        for folder, key in [("images", "image"), ("labels", "label")]:
            with Image.open(root / folder / "train" / f"{example['name']}.png") as file:
                np.testing.assert_array_equal(example[key], np.asarray(file))
    assert source[0]["image"].dtype == np.uint8 and source[0]["label"].dtype == np.int32


def test_a_pickled_source_reads_the_same(root):
    source = open_dataset("folder", str(root), "train")
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(source))[1]["image"], source[1]["image"]
    )


def number(root, name="a", pixels=None, **options):
    """Writes instance files for every image of the split; the file of `name` gets `pixels`."""
    for path in root.glob("labels/train/*.png"):
        with Image.open(path) as label:
            zeros = np.zeros((label.height, label.width), np.uint8)
        save(root / "instances" / "train" / path.name, zeros)
    if pixels is not None:
        save(root / "instances" / "train" / f"{name}.png", pixels, **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_instances_are_read_as_they_are(root, dtype):
    assert not open_dataset("folder", str(root), "train").has_instances
    pixels = np.zeros((5, 3), dtype)
    pixels[1:3] = np.iinfo(dtype).max
    number(root, pixels=pixels)
    source = open_dataset("folder", str(root), "train")
    assert source.has_instances and source.instances(0).dtype == np.int32
    np.testing.assert_array_equal(source.instances(0), pixels)
    assert not source.instances(1).any()
    assert not open_dataset("folder", str(root), "val").has_instances


def test_a_copy_has_the_same_fingerprint_and_a_changed_pixel_another(root, tmp_path):
    first = open_dataset("folder", str(root), "train").fingerprint
    for kind in ("images", "labels"):
        shutil.copytree(root / kind, tmp_path / "copy" / kind, copy_function=shutil.copyfile)
    shutil.copyfile(root / "dataset.json", tmp_path / "copy" / "dataset.json")
    assert open_dataset("folder", str(tmp_path / "copy"), "train").fingerprint == first
    path = tmp_path / "copy" / "images" / "train" / "a.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0] += 1
    Image.fromarray(pixels).save(path)
    assert open_dataset("folder", str(tmp_path / "copy"), "train").fingerprint != first


def test_the_fingerprint_covers_instances(root):
    fingerprints = [open_dataset("folder", str(root), "train").fingerprint]
    for value in (1, 2):
        number(root, pixels=np.full((5, 3), value, np.uint16))
        fingerprints.append(open_dataset("folder", str(root), "train").fingerprint)
    assert len(set(fingerprints)) == 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "JPG", "webp", "tif", "tiff"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_formats(root, suffix, mode):
    smooth = np.add.outer(np.arange(16), np.arange(24)).astype(np.uint8) * 5
    save(root / "images" / "train" / f"z.{suffix}", smooth, mode)
    save(root / "labels" / "train" / "z.png", np.zeros((16, 24), np.uint8))
    image = open_dataset("folder", str(root), "train")[3]["image"]
    assert image.shape == (16, 24, 3)
    assert np.abs(image.astype(int) - smooth[..., None]).max() <= 12  # lossy formats


def test_gray_only_if_every_image_of_every_split_is(root):
    for path in root.glob("images/*/*.png"):
        with Image.open(path) as image:
            gray = image.convert("L")
        gray.save(path)
    source = open_dataset("folder", str(root), "train")
    assert source.num_channels == 1 and source[0]["image"].shape == (5, 3, 1)
    save(root / "images" / "val" / "v.png", np.zeros((2, 2, 3), np.uint8))
    source = open_dataset("folder", str(root), "train")
    assert source.num_channels == 3 and source[0]["image"].shape == (5, 3, 3)


def channels(path: pathlib.Path, num_channels: int, dtype=np.uint8) -> None:
    """Replaces a.png by another image of its size."""
    path.with_suffix(".png").unlink()
    pixels = np.zeros((5, 3, num_channels), dtype)
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_other_numbers_of_channels(root, suffix):
    for path in [p for p in root.glob("images/*/*.png") if p.stem != "a"]:
        path.unlink()
        (root / "labels" / path.parent.name / path.name).unlink()
    channels(root / "images" / "train" / f"a{suffix}", 5)
    source = open_dataset("folder", str(root), "train")
    assert source.num_channels == 5 and source[0]["image"].shape == (5, 3, 5)


def test_images_keep_the_values_of_their_files(root):
    """All of 16 bits are uint16; the range in dataset.json changes no value of theirs."""
    fingerprints = []
    for split in Folder.splits(root):
        for path in (root / "images" / split).glob("*.png"):
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("L")).astype(np.uint16) * 257
            save(path, pixels)
    for limits in (None, [0, 4095], [-10.0, 10.0]):
        if limits:
            write_options(root, range=limits)
        source = open_dataset("folder", str(root), "train")
        fingerprints.append(source.fingerprint)
        assert source.dtype == "uint16" and source.value_range == (limits and tuple(limits))
        with Image.open(root / "images" / "train" / "b.png") as image:
            np.testing.assert_array_equal(source[1]["image"][..., 0], np.asarray(image))
        assert source[1]["image"].dtype == np.uint16
    assert len(set(fingerprints)) == 3


def test_8_bits_among_others_are_between_the_two_values_of_the_range(root):
    np.save(root / "images" / "train" / "a.npy", np.full((5, 3), -0.5))
    (root / "images" / "train" / "a.png").unlink()
    with Image.open(root / "images" / "train" / "b.png") as image:
        stored = np.asarray(image)
    for limits in (None, [-1, 3]):
        if limits:
            write_options(root, range=limits)
        for split in ("train", "val"):
            assert open_dataset("folder", str(root), split).dtype == "float32"
        source = open_dataset("folder", str(root), "train")
        assert (source[0]["image"] == -0.5).all() and source[0]["image"].dtype == np.float32
        expected = stored if limits is None else -1 + 4 * (stored / 255)
        found = source[1]["image"]
        np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1", "CMYK"])
def test_other_modes_become_rgb(root, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    save(root / "images" / "train" / f"z.{suffix}", np.full((2, 3, 3), 255, np.uint8), mode)
    save(root / "labels" / "train" / "z.png", np.zeros((2, 3), np.uint8))
    image = open_dataset("folder", str(root), "train")[3]["image"]
    np.testing.assert_array_equal(image, np.full((2, 3, 3), 255))


def test_transparent_palette_image(root):
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(root / "images" / "train" / "a.png", transparency=b"\x00\xff")
    save(root / "labels" / "train" / "a.png", np.zeros((2, 3), np.uint8))
    image = open_dataset("folder", str(root), "train")[0]["image"]
    np.testing.assert_array_equal(image, np.tile([10, 20, 30], (2, 3, 1)))


def test_palette_labels_give_their_indices(root):
    label = Image.new("P", (3, 5), 1)
    label.putpalette([0, 0, 0, 200, 100, 50])
    label.save(root / "labels" / "train" / "a.png")
    assert (open_dataset("folder", str(root), "train")[0]["label"] == 1).all()


def test_values_and_ignored_values(root):
    raw = np.array([[0, 255, 7], [128, 9, 255]], np.uint8)
    for path in root.glob("labels/train/*.png"):
        size = open_dataset("folder", str(root), "train").sizes["abc".index(path.stem)]
        save(path, np.resize(raw, size))
    write_options(root, values=[255, 0], ignored_values=[7, 9, 128], palette=[[0, 0, 0], [9, 8, 7]])
    source = open_dataset("folder", str(root), "train")
    expected = np.array([[1, 0, IGNORE_LABEL], [IGNORE_LABEL, IGNORE_LABEL, 0]])
    np.testing.assert_array_equal(source[0]["label"], np.resize(expected, (5, 3)))
    np.testing.assert_array_equal(source.palette, [[0, 0, 0], [9, 8, 7]])


def test_classes_of_several_values_are_merged_for_all_who_read_them(root, tmp_path):
    rng = np.random.default_rng(0)
    raw = {path: rng.choice([0, 1, 40000], (5, 3)) for path in root.glob("labels/*/*.png")}
    for path, pixels in raw.items():
        save(path, pixels.astype(np.uint16))
        image = rng.integers(0, 256, (5, 3, 3), "uint8")
        save(root / "images" / path.parent.name / path.name, image)
    write_options(root, values=[0, [1, 40000]])
    prepare.copy("folder", str(root), str(tmp_path / "records"))
    report = doctor.examine("folder", str(root))
    for split in ("train", "val"):
        labels = [np.minimum(raw[path], 1) for path in sorted(raw) if path.parent.name == split]
        for name, where in (("folder", root), ("records", tmp_path / "records")):
            source = open_dataset(name, str(where), split)
            np.testing.assert_array_equal([example["label"] for example in source], labels)
        assert not report[split]["errors"]
        assert report[split]["pixels"]["road"] == np.sum(labels)


def test_labels_of_16_bits(root):
    save(root / "labels" / "train" / "a.png", np.full((5, 3), 40000, np.uint16))
    write_options(root, values=[0, 40000], ignored_values=[1])
    assert (open_dataset("folder", str(root), "train")[0]["label"] == 1).all()


def test_names_outside_ascii(root):
    save(root / "images" / "train" / "straße 漢.png", np.zeros((2, 3, 3), np.uint8))
    save(root / "labels" / "train" / "straße 漢.png", np.zeros((2, 3), np.uint8))
    assert open_dataset("folder", str(root), "train")[3]["name"] == "straße 漢"


# vision#109, BiaPy#125
@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "lost+found"])
def test_folders_of_the_system_are_no_splits(root, name):
    (root / "images" / name).mkdir()
    assert Folder.splits(root) == ("train", "val")
    for kind in ("images", "labels"):
        (root / kind / "train" / name).mkdir()
    assert len(open_dataset("folder", str(root), "train")) == 3


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_with_composed_and_decomposed_letters_are_the_same(root, forms):
    for kind, form in zip(("images", "labels"), forms, strict=True):
        shape = (2, 3, 3) if kind == "images" else (2, 3)
        name = unicodedata.normalize(form, "Müller")
        save(root / kind / "train" / f"{name}.png", np.zeros(shape, np.uint8))
    source = open_dataset("folder", str(root), "train")
    assert source.names[0] == unicodedata.normalize("NFC", "Müller") and len(source) == 4


def test_a_copy_by_a_system_that_decomposes_names_has_the_same_fingerprint(tmp_path):
    found = set()
    for form in ("NFC", "NFD"):
        path = tmp_path / unicodedata.normalize(form, "Müller.png")
        path.write_bytes(b"the same")
        item = files.Item("Müller", path, path)
        classes = files.Classes(names=("a", "b"), values=(0, 1))
        found.add(files.Files(tmp_path, [item], classes, 3).fingerprint)
    assert len(found) == 1


def test_dataset_json_may_begin_with_a_byte_order_mark(root):
    path = root / "dataset.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert open_dataset("folder", str(root), "train").class_names == ("sky", "road")


def test_hidden_files_and_notes_are_passed_over(root):
    (root / "images" / "train" / "._a.png").write_bytes(b"")
    (root / "labels" / "train" / "notes.txt").write_text("by hand")
    assert len(open_dataset("folder", str(root), "train")) == 3


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pages(path: pathlib.Path) -> None:
    page = Image.new("L", (3, 5))
    page.save(path, save_all=True, append_images=[page])


TRAIN_IMAGES = "images/train"
ERRORS = {  # how to break the dataset, and what the message must contain
    "no root": (lambda r: shutil.rmtree(r), ["no such folder"]),
    "no dataset.json": (lambda r: (r / "dataset.json").unlink(), ["dataset.json", "no such file"]),
    "not json": (
        lambda r: (r / "dataset.json").write_text("{'classes'}"),
        ["dataset.json", "not valid JSON"],
    ),
    "a key given twice": (
        lambda r: (r / "dataset.json").write_text('{"classes": ["a", "b"], "classes": ["b", "a"]}'),
        ["dataset.json", "'classes'", "more than once"],
    ),
    "a class without a name": (lambda r: write_options(r, classes=["a", " "]), ["names", "' '"]),
    "not an object": (lambda r: (r / "dataset.json").write_text("[]"), ["dataset.json", "classes"]),
    "unknown key": (lambda r: write_options(r, colors=[]), ["colors", "palette"]),
    "no classes": (lambda r: write_options(r, classes=[]), ["2 to 255"]),
    # segmentation_models#401, transformers#20279: one output and a sigmoid
    "a single class": (
        lambda r: write_options(r, classes=["é"]),
        ["dataset.json", '"classes": ["background", "é"]'],
    ),
    "many classes": (
        lambda r: write_options(r, classes=[str(i) for i in range(256)]),
        ["2 to 255"],
    ),
    "same class": (lambda r: write_options(r, classes=["a", "a"]), ["'a'", "more than once"]),
    "same value": (lambda r: write_options(r, values=[3, 3]), ["[3]", "more than once"]),
    "same value merged": (
        lambda r: write_options(r, values=[[1, 3], [2, 3]]),
        ["[3]", "more than once", "sky, road"],
    ),
    "same value in a class": (
        lambda r: write_options(r, values=[0, [3, 3]]),
        ["[3]", "more than once", "road"],
    ),
    "ignored value merged": (
        lambda r: write_options(r, values=[0, [1, 2]], ignored_values=[2]),
        ["[2]", "road, ignored_values"],
    ),
    "no value of a class": (lambda r: write_options(r, values=[0, []]), ['"values"', "[0, []]"]),
    "values not a list": (lambda r: write_options(r, values=3), ['"values"', "got 3"]),
    "text among values": (lambda r: write_options(r, values=[0, [1, "2"]]), ["0..65535", "'2'"]),
    "ignored class": (lambda r: write_options(r, ignored_values=[1]), ["[1]", "more than once"]),
    "range of one": (lambda r: write_options(r, range=[3]), ["dataset.json", "range", "[3]"]),
    "empty range": (lambda r: write_options(r, range=[3, 3]), ["dataset.json", "range"]),
    "endless range": (lambda r: write_options(r, range=[0, math.inf]), ["dataset.json", "range"]),
    "range of words": (lambda r: write_options(r, range=["0", "9"]), ["dataset.json", "range"]),
    "other channels": (
        lambda r: channels(r / "images/train/a.tif", 5),
        ["train/b.png has 3", "train/a.tif has 5"],
    ),
    "other channels in another split": (
        lambda r: np.save(r / "images/val/w.npy", np.zeros((2, 2, 2), np.uint8)),
        ["train/a.png has 3", "val/w.npy has 2"],
    ),
    "few values": (lambda r: write_options(r, values=[3]), ["2 classes", "1 values"]),
    "large value": (lambda r: write_options(r, values=[0, 65536]), ["65536", "0..65535"]),
    "text value": (lambda r: write_options(r, ignored_values=["1"]), ["ignored_values"]),
    "palette of one": (lambda r: write_options(r, palette=[[0, 0, 0]]), ["palette", "2 classes"]),
    "palette of floats": (lambda r: write_options(r, palette=[[0.5] * 3] * 2), ["palette"]),
    "no split": (
        lambda r: shutil.rmtree(r / TRAIN_IMAGES),
        ["no split 'train'", "there are: val"],
    ),
    "no images": (lambda r: shutil.rmtree(r / "images"), ["images", "no such folder"]),
    "no labels": (lambda r: shutil.rmtree(r / "labels/train"), ["labels/train", "no such folder"]),
    "empty split": (
        lambda r: [path.unlink() for path in (r / TRAIN_IMAGES).iterdir()],
        [TRAIN_IMAGES, "no images"],
    ),
    "images of another kind": (
        lambda r: [path.rename(path.with_suffix(".bmp")) for path in (r / TRAIN_IMAGES).iterdir()],
        [TRAIN_IMAGES, "no images", "a.bmp, b.bmp, c.bmp", ".png, .jpg"],
    ),
    "images one folder deeper": (
        lambda r: [
            path.rename(folder / path.name)
            for folder in [r / TRAIN_IMAGES / "deeper"]
            for path in [*(r / TRAIN_IMAGES).iterdir(), folder.mkdir()]
            if path
        ],
        [TRAIN_IMAGES, "no images", "deeper/"],
    ),
    "a label of another kind": (
        lambda r: (r / "labels/train/b.png").rename(r / "labels/train/b.tif"),
        ["no label", "1 files: b.png", "not read: b.tif (only .png)"],
    ),
    "a folder called like an image": (
        lambda r: ((r / "images/train/b.png").unlink(), (r / "images/train/b.png").mkdir()),
        ["no image", "1 files: b.png", "not read: b.png/"],
    ),
    "nothing labeled": (
        lambda r: (
            write_options(r, ignored_values=[255]),
            [save(p, np.full_like(Image.open(p), 255)) for p in r.glob("labels/train/*.png")],
        ),
        ["every pixel of all 3 labels (a, b, c) is ignored"],
    ),
    "label missing": (
        lambda r: (r / "labels/train/b.png").unlink(),
        ["no label", "1 files: b.png"],
    ),
    "image missing": (
        lambda r: (r / "images/train/b.png").unlink(),
        ["no image", "1 files: b.png"],
    ),
    "two of a name": (
        lambda r: save(r / "images/train/a.jpg", np.zeros((5, 3, 3), np.uint8)),
        ["a.jpg and a.png", "same name"],
    ),
    "sizes differ": (
        lambda r: save(r / "labels/train/a.png", np.zeros((3, 5), np.uint8)),
        ["a.png", "5 x 3", "3 x 5"],
    ),
    "color label": (
        lambda r: save(r / "labels/train/a.png", np.zeros((5, 3, 3), np.uint8)),
        ["labels/train/a.png", "one channel", "'RGB'"],
    ),
    "undeclared value": (
        lambda r: save(r / "labels/train/a.png", np.array([[0, 1, 1]] * 4 + [[0, 7, 9]], np.uint8)),
        ["labels/train/a.png", "[7, 9]", "0: 5, 1: 8, 7: 1, 9: 1"],
    ),
    "one class more": (
        lambda r: save(r / "labels/train/a.png", np.full((5, 3), len(CLASSES), np.uint8)),
        ["labels/train/a.png", "[2]", "2: 15"],
    ),
    "undeclared 255": (
        lambda r: save(r / "labels/train/a.png", np.full((5, 3), 255, np.uint8)),
        ["a.png", "255: 15", '"values": [0, 255]'],
    ),
    "truncated image": (lambda r: truncate(r / "images/train/b.png"), ["images/train/b.png"]),
    "truncated label": (lambda r: truncate(r / "labels/train/b.png"), ["labels/train/b.png"]),
    "not an image": (
        lambda r: (r / "images/train/b.png").write_text("hello"),
        ["images/train/b.png", "not a readable image"],
    ),
    "empty file": (lambda r: (r / "labels/train/b.png").write_bytes(b""), ["labels/train/b.png"]),
    "instances missing": (
        lambda r: (number(r), (r / "instances/train/b.png").unlink()),
        ["no instances in", "instances/train for 1 files: b.png"],
    ),
    "instances of another size": (
        lambda r: number(r, pixels=np.zeros((3, 5), np.uint8)),
        ["instances/train/a.png", "3 x 5", "5 x 3"],
    ),
    "color instances": (
        lambda r: number(r, pixels=np.zeros((5, 3, 3), np.uint8)),
        ["instances/train/a.png", "one channel", "'RGB'"],
    ),
    "truncated instances": (
        lambda r: (number(r), truncate(r / "instances/train/b.png")),
        ["instances/train/b.png"],
    ),
    "not a number": (
        lambda r: (
            (r / "images/train/a.png").unlink(),
            np.save(r / "images/train/a.npy", np.full((5, 3), np.nan)),
        ),
        ["images/train/a.npy", "NaN"],
    ),
    "float label": (
        lambda r: save(r / "labels/train/a.png", np.zeros((5, 3), np.float32), format="TIFF"),
        ["labels/train/a.png", "'F'"],
    ),
    "pages": (
        lambda r: ((r / "images/train/a.png").unlink(), pages(r / "images/train/a.tif")),
        ["a.tif", "2 pages"],
    ),
}


# 29. MMSegmentation#1601, #2081, #2146: NaN or 0 IoU from labels that are no class
@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_culprit(root, case):
    verify.verify(open_dataset("folder", str(root), "train"))  # good before it is broken
    spoil, words = ERRORS[case]
    spoil(root)
    with pytest.raises(ValueError) as error:
        verify.verify(open_dataset("folder", str(root), "train"))
    for word in words:
        assert word in str(error.value)


def test_missing_labels_are_counted(root):
    for i in range(7):
        save(root / "images" / "train" / f"x{i}.png", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(
        ValueError, match=r"7 files: x0.png, x1.png, x2.png, x3.png, x4.png and 2 more"
    ):
        open_dataset("folder", str(root), "train")


def test_verify_lists_all_that_is_wrong(root):
    truncate(root / "images/train/a.png")
    truncate(root / "labels/train/c.png")
    with pytest.raises(ValueError, match="2 of 3 examples are bad") as error:
        verify.verify(open_dataset("folder", str(root), "train"))
    assert "images/train/a.png" in str(error.value) and "labels/train/c.png" in str(error.value)


class CountsReads(Folder):
    """A folder that counts how often an example is read."""

    reads = 0

    def __getitem__(self, i):
        self.reads += 1
        return super().__getitem__(i)


def test_verified_once_until_a_file_changes(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # other tests have the same files

    def reads() -> int:
        source = CountsReads(root, "train")
        present = {k for i in range(3) for k in np.unique(Folder(root, "train")[i]["label"])}
        names = [name for k, name in enumerate(source.class_names) if k in present]
        assert verify.verify(source) == names
        return source.reads

    assert [reads(), reads()] == [3, 0]
    save(root / "labels" / "train" / "a.png", np.ones((5, 3), np.uint8), compress_level=0)
    assert [reads(), reads()] == [3, 0]
    write_options(root, ignored_values=[9])
    assert reads() == 3
    truncate(root / "labels/train/a.png")
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(ValueError, match=r"a\.png"):
            reads()


def test_headers_are_enough_for_sizes(root, monkeypatch):
    def refuse(*args):
        raise AssertionError("decoded")

    source = open_dataset("folder", str(root), "train")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    assert source.sizes.tolist() == [[5, 3], [4, 6], [1, 1]] and source.num_channels == 3


def test_a_picture_on_its_side_fits_the_label_of_it_upright(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    (root / "images" / "train" / "a.png").unlink()
    save(root / "images" / "train" / "a.jpg", np.zeros((3, 5, 3), np.uint8), exif=exif)
    source = open_dataset("folder", str(root), "train")
    assert source.sizes[0].tolist() == [5, 3] == list(source[0]["image"].shape[:2])


def test_many_files_open_in_a_moment(root, monkeypatch):
    """Listing them takes little time, and one header per file is read."""
    read = []

    def header(path):
        read.append(path)
        return decode.Header(1, 1, 3, np.dtype(np.uint8))

    monkeypatch.setattr(files, "header", header)
    for kind in ("images", "labels"):
        folder = root / kind / "train"
        for i in range(5_000):
            os.link(folder / "c.png", folder / f"{i:05d}.png")
    start = time.process_time()
    source = open_dataset("folder", str(root), "train")
    assert time.process_time() - start < 2  # about 0.3 s
    assert len(source) == 5_003 and len(read) == len(set(read)) == 5_004


@pytest.fixture
def listed(tmp_path) -> pathlib.Path:
    """The same dataset, with split files."""
    for name, size in [("b", (4, 6)), ("a", (5, 3)), ("straße", (1, 1)), ("v", (2, 2))]:
        save(tmp_path / "images" / f"{name}.png", np.zeros((*size, 3), np.uint8))
        save(tmp_path / "labels" / f"{name}.png", np.ones(size, np.uint8))
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "train.txt").write_text("straße\na\n", encoding="utf-8-sig")
    (tmp_path / "splits" / "._train.txt").write_bytes(b"\0\5\26\7")
    (tmp_path / "splits" / "val.txt").write_text("\nv\n")
    write_options(tmp_path)
    return tmp_path


def test_split_files(listed):
    assert Folder.splits(listed) == ("train", "val")
    source = open_dataset("folder", str(listed), "train")
    assert [example["name"] for example in source] == ["a", "straße"]
    np.testing.assert_array_equal(source.sizes, [[5, 3], [1, 1]])
    assert not source.has_instances
    for name in ("a", "straße"):
        with Image.open(listed / "labels" / f"{name}.png") as label:
            save(listed / "instances" / f"{name}.png", np.asarray(label) + 6)
    source = open_dataset("folder", str(listed), "train")
    assert source.has_instances and (source.instances(1) == 7).all()
    with pytest.raises(ValueError, match=r"val\.txt, line 2: .*instances/v\.png"):
        open_dataset("folder", str(listed), "val")


LIST_ERRORS = {
    "twice": ("train", "a\nb\na\n", ["splits/train.txt, line 3", "'a'", "line 1"]),
    "in two": ("train", "a\nb\nv", ["splits/val.txt, line 2", "'v'", "splits/train.txt, line 3"]),
    "unknown": ("train", "b\nc\n", ["splits/train.txt, line 2", "images/c.*"]),
    "with its ending": ("train", "b.png", ["line 1", "images/b.png.*", "without their ending"]),
    "not UTF-8": ("train", "a\nstra\udcdfe", ["splits/train.txt, line 2"]),
    "empty": ("train", "\n", ["splits/train.txt", "no images"]),
    "no such": ("test", None, ["no split 'test'", "splits/SPLIT.txt", "there are: train, val"]),
}


@pytest.mark.parametrize("case", LIST_ERRORS)
def test_errors_of_split_files_name_the_line(listed, case):
    split, text, words = LIST_ERRORS[case]
    if text is not None:
        path = listed / "splits" / f"{split}.txt"
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError) as error:
        open_dataset("folder", str(listed), split)
    for word in words:
        assert word in str(error.value)


def test_a_listed_image_without_a_label(listed):
    (listed / "labels" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"train\.txt, line 2: .*labels/a\.png"):
        open_dataset("folder", str(listed), "train")


def test_real_camvid(real_data):
    source = open_dataset("folder", str(real_data / "camvid"), "val")
    assert (len(source), source.num_classes, source.num_channels) == (101, 11, 3)
    assert (source.sizes == [360, 480]).all()
    example = source[50]
    path = real_data / "camvid" / "labels" / "val" / f"{example['name']}.png"
    raw = np.asarray(Image.open(io.BytesIO(path.read_bytes())))
    np.testing.assert_array_equal(example["label"], np.where(raw == 11, IGNORE_LABEL, raw))
    assert example["image"].std() > 20
