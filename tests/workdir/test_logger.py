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


def test_without_a_terminal_a_line_tells_of_steps_and_evaluations(folder, caplog):
    log = logger.Logger(folder, first_step=0, num_steps=20, title="seed=3")
    ious = {"eval/iou/a": 0.75, "eval/iou/b": float("nan"), "eval/iou/c": 0.5}
    scores = {"eval/mean_iou": 0.625, "eval/loss": 0.25, "eval/dice/a": 0.1, **ious}
    many = {"eval/mean_iou": 0.5, "eval/loss": 1.0}
    many |= {f"eval/iou/{k}": (k * 7 % 10) / 10 for k in range(10)}
    with caplog.at_level("INFO"):
        log.trained(9, 0.5, "", say=False)
        log.trained(10, 0.5, "", say=True)
        log.trained(11, 0.25, "8.0 images/s, ETA 3.0 s", say=True)
        log.evaluated(11, scores, 65.0)
        log.evaluated(20, many, 0.5)
    log.close()
    assert caplog.text.count("\n") == 4
    shown = " ".join(caplog.messages)
    assert shown == (
        "seed=3, step 10/20: loss 0.5000 "
        "seed=3, step 11/20: loss 0.2500, 8.0 images/s, ETA 3.0 s "
        "seed=3, step 11/20: evaluation: mean IoU 0.625 (c 0.500, a 0.750), loss 0.2500, took "
        "1 min 5 s seed=3, step 20/20: evaluation: mean IoU 0.500 (worst of 10 classes: 0 0.000, "
        "3 0.100, 6 0.200, 9 0.300), loss 1.0000, took 0.5 s"
    )


def test_on_a_terminal_the_bar_has_the_latest_values(folder, monkeypatch, capsys):
    monkeypatch.setattr(logger.sys.stderr, "isatty", lambda: True, raising=False)
    log = logger.Logger(folder, first_step=0, num_steps=2)
    log.trained(1, 0.5, "8.0 images/s, ETA 3.0 s", say=True)
    log.evaluated(1, {"eval/mean_iou": 0.5, "eval/loss": 1.0}, 1.0)
    assert capsys.readouterr().err.endswith(
        "step 1/2, loss 0.5000, 8.0 images/s, ETA 3.0 s, mean IoU 0.500"
    )
    log.trained(2, 0.25, "8.0 images/s, ETA 0.5 s", say=True)
    log.evaluated(2, {"eval/mean_iou": 0.75, "eval/loss": 1.0}, 1.0)
    log.close()
    end = capsys.readouterr().err.rstrip()
    assert end.endswith("step 2/2, loss 0.2500, mean IoU 0.750")
