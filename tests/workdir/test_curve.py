"""Tests that the learning curve shows the numbers of the records."""

import json

import numpy as np
from etils import epath
from PIL import Image

from dense_jax.workdir import curve

RECORDS = [
    {"step": 10, "train/loss": 2.0, "train/grad_norm": 9.0},
    {"step": 20, "train/loss": 1.5},
    {"step": 20, "eval/loss": 1.75, "eval/mean_iou": 0.25},
    {"step": 30, "train/loss": 1.25},
    {"step": 30, "eval/loss": 1.5, "eval/mean_iou": None},
]


def test_each_line_has_the_values_of_its_metric():
    losses, scores = curve.figure(RECORDS).axes
    drawn = [np.array(line.get_data()) for axes in (losses, scores) for line in axes.lines]
    expected = ([10, 20, 30], [2.0, 1.5, 1.25]), ([20, 30], [1.75, 1.5]), ([20, 30], [0.25, np.nan])
    for line, values in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(line, values)
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [
        "training, single batches",
        "evaluation",
    ]


def test_it_is_drawn_into_the_workdir(tmp_path):
    lines = "".join(f"{json.dumps(record)}\n" for record in RECORDS)
    (tmp_path / "metrics.jsonl").write_text(lines)
    path = curve.draw(epath.Path(tmp_path))
    with Image.open(path) as picture:
        assert (path.name, picture.size) == ("learning_curve.png", (960, 720))
