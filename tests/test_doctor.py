"""The doctor command: what it counts, and that it fails where something is wrong."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dense_jax.data.doctor import as_text, examine


@pytest.fixture
def root(tmp_path):
    for split, label in [("train", [[0, 0, 1], [9, 9, 1]]), ("val", [[1]])]:
        label = np.array(label, np.uint8)
        for folder, pixels in [("images", label * 20), ("labels", label)]:
            (tmp_path / folder / split).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / folder / split / "a.png")
    options = {"classes": ["sky", "road"], "ignored_values": [9]}
    (tmp_path / "dataset.json").write_text(json.dumps(options))
    return tmp_path


def test_counts(root):
    report = examine("folder", str(root))
    assert report == {
        "train": {
            "num_examples": 1,
            "num_channels": 1,
            "min_size": [2, 3],
            "max_size": [2, 3],
            "pixels": {"sky": 2, "road": 2},
            "ignored_pixels": 2,
            "class_weights": {"median_frequency": [1.0, 1.0], "inverse_frequency": [1.0, 1.0]},
            "missing_classes": [],
            "errors": [],
        },
        "val": {
            "num_examples": 1,
            "num_channels": 1,
            "min_size": [1, 1],
            "max_size": [1, 1],
            "pixels": {"sky": 0, "road": 1},
            "ignored_pixels": 0,
            "class_weights": {"median_frequency": [0.0, 1.0], "inverse_frequency": [0.0, 1.0]},
            "missing_classes": ["sky"],
            "errors": [],
        },
    }
    text = as_text(report)
    assert "median_frequency: 0.0000, 1.0000" in text
    assert "33.333 %" in text and "never seen: sky" in text and "error" not in text


# 29. MMSegmentation#1601, #2081, #2146: NaN or 0 IoU from labels that are no class
def test_reports_every_error(root):
    (root / "labels" / "val" / "a.png").write_text("")
    Image.fromarray(np.full((2, 3), 7, np.uint8)).save(root / "labels" / "train" / "a.png")
    report = examine("folder", str(root))
    (train_error,), (val_error,) = report["train"]["errors"], report["val"]["errors"]
    assert "[7]" in train_error and "labels/val/a.png" in val_error
    text = as_text(report)
    assert f"  error: {train_error}" in text and f"  error: {val_error}" in text


def test_a_missing_root_is_an_error(tmp_path):
    (found,) = examine("folder", str(tmp_path / "nowhere")).values()
    assert "nowhere" in found["errors"][0]


def test_the_command_fails_on_errors(root):
    command = [sys.executable, "-m", "dense_jax.data.doctor", "--name=folder", f"--root={root}"]
    (root / "labels" / "val" / "a.png").write_text("")
    done = subprocess.run([*command, "--json"], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert json.loads(done.stdout) == examine("folder", str(root))
