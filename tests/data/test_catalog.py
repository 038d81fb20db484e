"""Tests that public datasets are read correctly, on tiny trees in the layouts of the downloads."""

import pickle

import numpy as np
import pytest
import scipy.io
import tifffile
from PIL import Image

from dense_jax.data import DATASETS, doctor, open_dataset, verify
from dense_jax.data.catalog import CATALOG
from dense_jax.data.files import Layout
from dense_jax.labels import IGNORE_LABEL

RNG = np.random.default_rng(0)


def write(path, pixels, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mat":
        scipy.io.savemat(path, {"GTcls": {"Segmentation": pixels, "CategoriesPresent": [1]}})
        return
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(palette)
    image.save(path)


def example(root, image, label, raw, palette=None):
    """Writes an image of the raw label's size, and the label."""
    raw = np.array(raw, np.uint8)
    write(root / image, RNG.integers(0, 256, (*raw.shape, 3)).astype(np.uint8))
    write(root / label, raw, palette)


def camvid(root):
    for split in ("train", "val", "test"):
        raw = [[0, 1, 2, 3], [8, 9, 10, 11]]
        example(root, f"{split}/0001TP_{split}.png", f"{split}annot/0001TP_{split}.png", raw)


def cityscapes(root):
    for split, city in (("train", "aachen"), ("train", "zurich"), ("val", "lindau")):
        name = f"{split}/{city}/{city}_000000_000019"
        example(
            root,
            f"leftImg8bit/{name}_leftImg8bit.png",
            f"gtFine/{name}_gtFine_labelIds.png",
            [[7, 8, 11, 33, 255], [0, 4, 10, 29, 30]],
        )
        write(root / "gtFine" / f"{name}_gtFine_color.png", np.zeros((2, 5, 4), np.uint8))
    (root / "gtFine" / "train" / ".DS_Store").write_text("")


def lost_and_found(root):
    for split, scene in (("train", "01_Hanns_Klemm"), ("test", "02_Hanns_Klemm")):
        name = f"{split}/{scene}/{scene}_000000_000010"
        example(
            root,
            f"leftImg8bit/{name}_leftImg8bit.png",
            f"gtCoarse/{name}_gtCoarse_labelIds.png",
            [[0, 1, 2, 30, 31], [32, 38, 39, 40, 43]],
        )


def scene_parse150(root):
    for folder, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        raw = [[0, 1, 2], [149, 150, 0]]
        example(root, f"images/{folder}/{name}.jpg", f"annotations/{folder}/{name}.png", raw)
    write(root / "images" / "testing" / "ADE_test_00000001.jpg", np.zeros((2, 3, 3), np.uint8))


def pascal_voc(root):
    palette = [channel for i in range(256) for channel in (i, 255 - i, 0)]
    for name in ("2007_000032", "2007_000033", "2007_000039"):
        image, label = f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png"
        example(root, image, label, [[0, 15, 255], [20, 1, 255]], palette)
    write(root / "JPEGImages" / "2012_detection_only.jpg", np.zeros((2, 3, 3), np.uint8))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000039\n2007_000032\n")
    (lists / "val.txt").write_text("2007_000033\n")


def isbi2012(root):
    root.mkdir(exist_ok=True)
    for name in ("volume", "labels"):
        pages = np.arange(30, dtype=np.uint8)[:, None, None] + np.zeros((30, 4, 6), np.uint8)
        pixels = pages if name == "volume" else np.where(pages % 2, 255, 0).astype(np.uint8)
        tifffile.imwrite(root / f"train-{name}.tif", pixels, photometric="minisblack")


I = IGNORE_LABEL
# What writes a dataset, its splits with the names in them, and the label of each.
CASES = {
    "camvid": (
        camvid,
        {"train": ["0001TP_train"], "val": ["0001TP_val"], "test": ["0001TP_test"]},
        [[0, 1, 2, 3], [8, 9, 10, I]],
    ),
    "cityscapes": (
        cityscapes,
        {
            "train": ["aachen_000000_000019", "zurich_000000_000019"],
            "val": ["lindau_000000_000019"],
        },
        [[0, 1, 2, 18, I], [I, I, I, I, I]],
    ),
    "lost_and_found": (
        lost_and_found,
        {"train": ["01_Hanns_Klemm_000000_000010"], "test": ["02_Hanns_Klemm_000000_000010"]},
        [[I, 0, 1, 1, I], [1, I, I, 1, 1]],
    ),
    "scene_parse150": (
        scene_parse150,
        {"train": ["ADE_train_00000001"], "val": ["ADE_val_00000001"]},
        [[I, 0, 1], [148, 149, I]],
    ),
    "pascal_voc": (
        pascal_voc,
        {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]},
        [[0, 15, I], [20, 1, I]],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_reads_a_download(name, tmp_path):
    make, splits, label = CASES[name]
    make(tmp_path)
    assert set(DATASETS[name].splits(str(tmp_path))) == set(splits)
    for split, names in splits.items():
        source = pickle.loads(pickle.dumps(open_dataset(name, str(tmp_path), split)))
        assert [source[i]["name"] for i in range(len(source))] == names
        for i, size in enumerate(source.sizes):
            np.testing.assert_array_equal(source[i]["label"], label)
            assert source[i]["image"].shape == (*size, source.num_channels)
    assert not any(found["errors"] for found in doctor.examine(name, str(tmp_path)).values())


def test_sections_of_isbi2012_are_pages(tmp_path):
    isbi2012(tmp_path)
    train, val = (open_dataset("isbi2012", str(tmp_path), split) for split in ("train", "val"))
    assert (len(train), len(val), train.num_channels) == (24, 6, 1)
    assert (val.sizes == [4, 6]).all()
    for k, section in enumerate([*train, *val]):
        assert (section["image"] == k).all() and (section["label"] == k % 2).all()
    assert len({section["name"] for section in [*train, *val]}) == 30
    (tmp_path / "train-labels.tif").write_bytes(b"II*\0")
    with pytest.raises(ValueError, match=r"train-labels\.tif, page 24: "):
        val[0]


@pytest.mark.parametrize("name", CATALOG)
def test_tables_are_complete(name):
    classes = CATALOG[name].classes
    assert len(set(classes.names)) == len(classes.names) == len(classes.values)
    values = [v for raw in classes.values for v in ([raw] if isinstance(raw, int) else raw)]
    values += classes.ignored_values
    assert len(set(values)) == len(values)
    if classes.palette:
        palette = np.array(classes.palette)
        assert palette.shape == (len(classes.names), 3)
        assert palette.min() >= 0 and palette.max() <= 255
    if name in ("cityscapes", "lost_and_found"):  # every id of their tables means something
        last = {"cityscapes": 33, "lost_and_found": 43}[name]
        assert set(values) - {255} == set(range(last + 1))


@pytest.mark.parametrize(
    "name, class_name, color",
    [
        ("pascal_voc", "bicycle", (0, 128, 0)),
        ("pascal_voc", "person", (192, 128, 128)),
        ("pascal_voc", "tvmonitor", (0, 64, 128)),
        ("cityscapes", "sky", (70, 130, 180)),
        ("camvid", "bicyclist", (0, 128, 192)),
        ("scene_parse150", "flag", (92, 0, 255)),
        ("scene_parse150", "person", (150, 5, 61)),
    ],
)
def test_colors_are_the_datasets_own(name, class_name, color):
    classes = CATALOG[name].classes
    assert classes.palette[classes.names.index(class_name)] == color


def test_voc_below_its_devkit_with_sbd_beside_it(tmp_path):
    """FCN's recipe in one root: train on SBD's list, evaluate on a list of VOC's validation."""
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    pascal_voc(voc)
    (voc / "ImageSets" / "Segmentation" / "seg11valid.txt").write_text("2007_000033\n")
    example(tmp_path, "dataset/img/2008_1.jpg", "dataset/cls/2008_1.mat", [[0, 15], [20, 1]])
    (tmp_path / "dataset" / "sbd_train.txt").write_text("2008_1\n\n")
    open_voc = DATASETS["pascal_voc"]
    assert open_voc.splits(tmp_path) == ("seg11valid", "train", "val", "sbd_train")
    (example_of_sbd,) = open_voc(tmp_path, "sbd_train")
    np.testing.assert_array_equal(example_of_sbd["label"], [[0, 15], [20, 1]])
    assert [e["name"] for e in open_voc(tmp_path, "seg11valid")] == ["2007_000033"]
    (tmp_path / "dataset" / "cls" / "2008_1.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(ValueError, match=r"2008_1\.mat"):
        open_voc(tmp_path, "sbd_train")[0]


def test_names_of_files_may_end_in_the_split(tmp_path):
    """The layout of DRIVE (retinal vessels), whose images and labels end differently."""
    example(tmp_path, "training/images/21_training.tif", "training/manual/21_manual1.gif", [[0]])
    layout = Layout(
        images="SPLIT/images/NAME_SPLIT.tif",
        labels="SPLIT/manual/NAME_manual1.gif",
        folders={"train": "training"},
    )
    assert [item.name for item in layout.items(tmp_path, "train")] == ["21"]


def test_a_list_that_names_no_file(tmp_path):
    pascal_voc(tmp_path)
    path = tmp_path / "ImageSets" / "Segmentation" / "val.txt"
    path.write_text("2007_000033\n2007_000034\n")
    with pytest.raises(ValueError, match=r"val\.txt, line 2: .*JPEGImages/2007_000034\.jpg"):
        open_dataset("pascal_voc", str(tmp_path), "val")


@pytest.mark.parametrize("name", CATALOG)
def test_a_root_without_the_dataset_says_what_was_expected(name, tmp_path):
    expected = CATALOG[name].layouts[0].images.replace("*", r"\*")
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{expected}"):
        open_dataset(name, str(tmp_path), "train")


def test_an_unknown_split_lists_those_there_are(tmp_path):
    camvid(tmp_path)
    with pytest.raises(ValueError, match="no split 'validation'; there are: train, val, test"):
        open_dataset("camvid", str(tmp_path), "validation")


def test_values_that_mean_nothing_are_errors(tmp_path):
    camvid(tmp_path)
    write(tmp_path / "trainannot" / "0001TP_train.png", np.full((2, 4), 12, np.uint8))
    with pytest.raises(ValueError, match=r"0001TP_train\.png: .*\[12\].*12: 8"):
        verify.verify(open_dataset("camvid", str(tmp_path), "train"))


def test_missing_labels_are_errors(tmp_path):
    cityscapes(tmp_path)
    for path in tmp_path.glob("gtFine/train/zurich/*labelIds.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no label in .*gtFine/train.*zurich_000000"):
        open_dataset("cityscapes", str(tmp_path), "train")


@pytest.mark.parametrize("name, num_train", [("camvid", 367), ("isbi2012", 24)])
def test_real_images_in_the_folder_layout(real_data, name, num_train):
    """It is read in the same way by its name and as a folder."""
    source, folder = (open_dataset(n, str(real_data / name), "train") for n in (name, "folder"))
    assert len(source) == len(folder) == num_train
    assert source.class_names == folder.class_names
    assert source.num_channels == folder.num_channels
    for key in ("image", "label"):
        np.testing.assert_array_equal(source[7][key], folder[7][key])
