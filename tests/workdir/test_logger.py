"""Tests that the log survives kills and resumes."""

import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from dense_jax.workdir import files, logger


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def write(folder, first_step, records):
    log = logger.Logger(folder, first_step=first_step, num_steps=10)
    for step, scalars in records:
        log.scalars(step, scalars)
    log.close()


def test_records_are_one_json_object_a_line_with_null_for_nan(folder):
    write(folder, 0, [(1, {"train/loss": 0.5}), (2, {"eval/iou/a": float("nan")})])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "train/loss": 0.5},
        {"step": 2, "eval/iou/a": None},
    ]


def test_resuming_drops_what_is_about_to_be_done_again(folder):
    write(
        folder,
        0,
        [(2, {"train/loss": 1.0}), (2, {"eval/mean_iou": 0.1}), (3, {"train/loss": 0.9})],
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tra')  # cut off by a kill
    write(folder, 2, [(3, {"train/loss": 0.8})])
    records = files.read_records(folder / "metrics.jsonl")
    assert records == [{"step": 2, "train/loss": 1.0}, {"step": 3, "train/loss": 0.8}]


def test_pictures_are_png_files_named_by_the_step(folder):
    log = logger.Logger(folder, first_step=0, num_steps=10)
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    log.picture(7, picture)
    log.close()
    np.testing.assert_array_equal(Image.open(folder / "pictures" / "0000007.png"), picture)
