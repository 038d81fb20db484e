"""Tests that the doctor command counts, finds problems, and fails if there are errors."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from dense_jax.data import doctor
from dense_jax.data.doctor import as_text, draw, examine


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)


@pytest.fixture
def root(tmp_path):
    for split, label in [("train", [[0, 0, 1], [9, 9, 1]]), ("val", [[1]])]:
        save(tmp_path / "images" / split / "a.png", np.array(label) * 20)
        save(tmp_path / "labels" / split / "a.png", label)
    options = {"classes": ["sky", "road"], "ignored_values": [9]}
    (tmp_path / "dataset.json").write_text(json.dumps(options))
    return tmp_path


@pytest.fixture
def scene(root):
    """A large smooth image of the train split."""
    y, x = np.mgrid[:90, :80]
    pixels = 128 + 60 * np.sin(x / 9 + y / 20) + 40 * np.cos(y / 11)
    save(root / "images" / "train" / "scene.png", pixels)
    save(root / "labels" / "train" / "scene.png", np.zeros((90, 80)))
    return pixels.astype(np.uint8)


def test_counts(root):
    nothing = {"interpolated_labels": [], "duplicates": [], "near_duplicates": [], "errors": []}
    assert examine("folder", str(root)) == {
        "train": {
            "num_examples": 1,
            "num_channels": 1,
            "dtype": "uint8",
            "min_size": [2, 3],
            "max_size": [2, 3],
            "pixels": {"sky": 2, "road": 2},
            "images": {"sky": 1, "road": 1},
            "regions": {},
            "ignored_pixels": 2,
            "class_weights": {"median_frequency": [1.0, 1.0], "inverse_frequency": [1.0, 1.0]},
            "missing_classes": [],
            **nothing,
            "warnings": [],
        },
        "val": {
            "num_examples": 1,
            "num_channels": 1,
            "dtype": "uint8",
            "min_size": [1, 1],
            "max_size": [1, 1],
            "pixels": {"sky": 0, "road": 1},
            "images": {"sky": 0, "road": 1},
            "regions": {},
            "ignored_pixels": 0,
            "class_weights": {"median_frequency": [0.0, 1.0], "inverse_frequency": [0.0, 1.0]},
            "missing_classes": ["sky"],
            **nothing,
            "warnings": ["never seen: sky"],
        },
    }


def test_images_without_a_range_are_warned_of_with_their_values(root):
    pixels = np.array([[7, 80, 900], [7, 7, 60000]], np.uint16)
    (path,) = (root / "images" / "train").iterdir()
    path.unlink()
    Image.fromarray(pixels).save(path.with_suffix(".png"))
    report = examine("folder", str(root))["train"]
    assert report["dtype"] == "float32" and not report["errors"]  # val has 8 bits
    (warning,) = report["warnings"]
    assert "float32 values from 7 to 60000" in warning and "normalization=percentiles" in warning
    assert "channels: 1 of float32" in as_text({"train": report})


def test_text(root):
    lines = as_text(examine("folder", str(root))).splitlines()
    assert lines[0] == "train: 1 examples, channels: 1, height x width: 2 x 3"
    rows = {words[0]: words[1:] for line in lines[1:5] if (words := line.split())}
    assert rows == {
        "class": ["pixels", "images", "median_frequency", "inverse_frequency"],
        "sky": ["2", "33.333", "%", "1", "1.0000", "1.0000"],
        "road": ["2", "33.333", "%", "1", "1.0000", "1.0000"],
        "(ignored)": ["2", "33.333", "%"],
    }
    assert "  warning: never seen: sky" in lines and lines[-1] == (
        "Errors: 0. Warnings: 1. The data can be trained on, if the warnings are no mistakes."
    )


def test_splits_come_in_the_order_of_their_use(root):
    for split in ("extra", "test", "a"):
        save(root / "images" / split / "a.png", [[1]])
        save(root / "labels" / split / "a.png", [[1]])
    assert list(examine("folder", str(root))) == ["train", "val", "test", "a", "extra"]


def test_a_class_that_only_other_splits_show_is_an_error(root):
    save(root / "labels" / "train" / "a.png", np.zeros((2, 3)))
    report = examine("folder", str(root))
    (error,) = report["train"]["errors"]
    assert error.startswith("class 'road' is in val, but not in train")


def test_what_lies_beside_the_images_and_is_not_read_is_said(root):
    save(root / "images" / "train" / "below" / "b.png", [[1]])
    (root / "images" / "train" / ".cache").mkdir()
    (warning,) = examine("folder", str(root))["train"]["warnings"]
    assert "not read: below/ (only" in warning


# 29. MMSegmentation#1601, #2081, #2146: NaN or 0 IoU from labels that are no class
def test_reports_every_error(root):
    (root / "labels" / "val" / "a.png").write_text("")
    save(root / "labels" / "train" / "a.png", np.full((2, 3), 7))
    report = examine("folder", str(root))
    (train_error,), (val_error,) = report["train"]["errors"], report["val"]["errors"]
    assert "[7]" in train_error and "labels/val/a.png" in val_error
    text = as_text(report)
    assert text.endswith("\nErrors: 2. Warnings: 2. Repair the errors before training.")
    assert f"  error: {train_error}" in text and f"  error: {val_error}" in text


# huggingface/datasets#6801, mmcv#2894
def test_images_that_cannot_be_opened_are_errors_that_name_them(root, scene):
    for kind in ("images", "labels"):
        (root / kind / "train" / "link.png").symlink_to(root / "nowhere.png")
    report = examine("folder", str(root))
    (error,) = report["train"]["errors"]
    assert "images/train/link.png" in error
    assert report["train"]["pixels"]["sky"] > 2 and not report["val"]["errors"]


def test_no_label_that_counts_is_an_error_of_train(root):
    save(root / "labels" / "train" / "a.png", np.full((2, 3), 9))
    error, *_ = examine("folder", str(root))["train"]["errors"]
    assert error.startswith("every pixel of every label is ignored")


def test_many_errors_are_cut_short_in_the_text_only(root):
    for i in range(12):
        save(root / "images" / "train" / f"bad{i}.png", [[0, 255]])
        save(root / "labels" / "train" / f"bad{i}.png", [[0, 255]])
    report = examine("folder", str(root))
    assert len(report["train"]["errors"]) == 12
    text = as_text(report)
    assert text.count("  error: ") == 10 and "and 2 errors more" in text
    assert 'write "values": [0, 255]' in text


def test_an_image_of_two_splits_is_an_error_however_it_is_stored(root, scene):
    save(root / "images" / "val" / "again.webp", np.stack([scene] * 3, axis=-1), lossless=True)
    save(root / "labels" / "val" / "again.png", np.ones((90, 80)))
    found = examine("folder", str(root))["val"]
    assert found["duplicates"] == [["train/scene", "again"]] and not found["near_duplicates"]
    assert found["errors"] == ["1 images are in train too, to the pixel: val/again = train/scene"]


def test_an_image_that_looks_like_one_of_another_split_is_a_warning(root, scene):
    for i in range(6):
        save(root / "images" / "val" / f"again{i}.jpg", scene, quality=60 + i)
        save(root / "labels" / "val" / f"again{i}.png", np.zeros((90, 80)))
    found = examine("folder", str(root))["val"]
    pairs = [["train/scene", f"again{i}"] for i in range(6)]
    assert found["near_duplicates"] == pairs and not found["errors"]
    (warning,) = found["warnings"]
    assert warning.startswith("6 images look like one of train: val/again0 ~ train/scene, ")
    assert warning.endswith("val/again4 ~ train/scene and 1 more")


def test_a_label_resized_by_interpolation_is_a_warning_with_its_name(root):
    classes = [str(i) for i in range(8)]
    (root / "dataset.json").write_text(json.dumps({"classes": classes, "ignored_values": [9]}))
    label = Image.fromarray(np.kron([[0, 7], [4, 0]], np.ones((30, 30))).astype(np.uint8))
    for resample in (Image.Resampling.BILINEAR, Image.Resampling.NEAREST):
        name = f"{resample.name}.png"
        label.resize((99, 99), resample).save(root / "labels" / "train" / name)
        save(root / "images" / "train" / name, np.zeros((99, 99)))
    found = examine("folder", str(root))["train"]
    assert found["interpolated_labels"] == ["BILINEAR"]
    assert found["warnings"][-1].startswith("1 labels have borders that run through other classes")
    assert found["warnings"][-1].endswith(": BILINEAR")


def test_a_missing_root_is_an_error(tmp_path):
    (found,) = examine("folder", str(tmp_path / "nowhere")).values()
    assert "nowhere" in found["errors"][0]
    draw("folder", str(tmp_path / "nowhere"), [""], str(tmp_path / "picture.png"))
    assert not (tmp_path / "picture.png").exists()


def test_no_split_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    (found,) = examine("folder", str(tmp_path)).values()
    assert found["errors"] == [f"{tmp_path}: no splits"]


def test_the_picture_leaves_out_what_cannot_be_read(root, scene):
    def size() -> tuple[int, int]:
        draw("folder", str(root), examine("folder", str(root)), str(root / "picture.png"))
        with Image.open(root / "picture.png") as picture:
            return picture.size

    whole = size()
    (root / "labels" / "train" / "a.png").write_text("")
    without_one = size()
    assert without_one[0] < whole[0]
    (root / "labels" / "val" / "a.png").unlink()
    assert size()[1] < without_one[1]


def test_the_command_fails_on_errors_alone(root, monkeypatch, capsys):
    command = [sys.executable, "-m", "dense_jax.data.doctor", "--name=folder", f"--root={root}"]
    command.append(f"--picture={root}/pictures/a.png")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "Errors: 0. Warnings: 1." in done.stdout
    assert (root / "pictures" / "a.png").read_bytes().startswith(b"\x89PNG")
    (root / "labels" / "val" / "a.png").write_text("")
    given = types.SimpleNamespace(name="folder", root=str(root), json=True, picture=None)
    monkeypatch.setattr(doctor.flags, "FLAGS", given)
    with pytest.raises(SystemExit, match="True"):
        doctor.main([])
    assert json.loads(capsys.readouterr().out) == examine("folder", str(root))


def assert_labels_lie_above(reports, distance, splits):
    """The labels of these datasets are about half a pixel too high."""
    for split in splits:
        (warning,) = reports[split]["warnings"]
        assert warning.startswith(f"labels lie {distance} pixels above the edges of the images")


def test_real_camvid(real_data):
    """Other code computed these counts and weights from the same files."""
    report = examine("folder", str(real_data / "camvid"))
    train = report["train"]
    assert [found["num_examples"] for found in report.values()] == [367, 101, 233]
    assert list(train["pixels"].values()) == [
        *(10682767, 14750079, 623349, 20076880, 2845085, 6166762, 743859, 714595, 3719877),
        *(405385, 184967),
    ]
    assert train["ignored_pixels"] == 2503995
    weights = [0.2794, 0.2018, 4.7889, 0.1491, 1, 0.4235, 3.8464, 1.9798, 0.7890, 6.3847, 8.8193]
    np.testing.assert_allclose(
        train["class_weights"]["median_frequency"], weights, rtol=0, atol=6e-5
    )
    assert not any(found["errors"] for found in report.values())
    assert_labels_lie_above(report, 0.5, ("train", "test"))


def test_real_isbi(real_data):
    report = examine("folder", str(real_data / "isbi2012"))
    assert [found["num_examples"] for found in report.values()] == [24, 6]
    assert not any(found["errors"] for found in report.values())
    assert_labels_lie_above(report, 0.6, ("train",))
    assert_labels_lie_above(report, 0.5, ("val",))
