"""Tests what the record of a run keeps, and the order in which it is written."""

import math

import jax
import numpy as np
import pytest
from etils import epath

from dense_jax import storage
from dense_jax.workdir import files
from dense_jax.workdir.record import RunFolder, RunRecord
from experiments import base
from tests.test_train import NUM_STEPS, make_config


@pytest.mark.parametrize(("step", "norm", "warnings"), [(5, 0.0, 1), (5, 0.1, 0), (6, 0.0, 0)])
def test_a_first_step_that_learns_nothing_is_said(step, norm, warnings, tmp_path, caplog):
    record = RunRecord(RunFolder(epath.Path(tmp_path), base.get_config()), {})
    record.rewind(4)
    record.record(step, {"train/loss": 0.5, "train/grad_norm": norm}, [])
    record.close()
    assert caplog.text.count("is exactly 0, so nothing is learned") == warnings


DATASET = {"class_names": ["a"], "num_channels": 1, "num_examples": 1}
DATASET |= {"fingerprint": None, "eval_fingerprint": None}


def begun(tiny_folder, path):
    return RunRecord(RunFolder(epath.Path(path), make_config(tiny_folder)), DATASET)


def test_the_experiment_file_is_kept_as_it_was_when_the_run_began(tiny_folder, tmp_path):
    file = tmp_path / "mine.py"
    file.write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    begun_with = file.read_bytes()
    folder = RunFolder(epath.Path(tmp_path / "run"), make_config(tiny_folder), "", str(file))
    RunRecord(folder, DATASET).close()
    assert (tmp_path / "run" / "experiment.py").read_bytes() == begun_with
    file.write_text("# edited\n")
    RunRecord(folder, DATASET).close()
    assert (tmp_path / "run" / "experiment.py").read_bytes() == begun_with


@pytest.mark.parametrize("damage", ["empty", "gone", "half", "a bad byte"])
def test_without_its_records_a_run_goes_on_from_its_best_state(tiny_folder, tmp_path, damage):
    scores = {"eval/mean_iou": 0.5, "eval/iou/a": math.nan, "eval/loss": 0.7}
    state = {"a": jax.device_put(np.zeros(3, np.float32))}
    record = begun(tiny_folder, tmp_path)
    record.rewind(0)
    record.score(4, state, scores, None, 1.0)
    record.save(5, state)
    record.close()
    records = tmp_path / "metrics.jsonl"
    content = records.read_bytes()
    if damage == "gone":
        records.unlink()
    else:
        half = content[: len(content) // 2]
        bad = content.replace(b"mean", b"me\xffn")
        records.write_bytes({"empty": b"", "half": half, "a bad byte": bad}[damage])
    record = begun(tiny_folder, tmp_path)
    record.rewind(5)
    worse = scores | {"eval/mean_iou": 0.25}
    record.score(NUM_STEPS, state, worse, None, 1.0)
    record.close()
    record.finish(3, {"peak_bytes": 1}, {"num_eval_images": 7})
    result = files.read_json(tmp_path / "result.json")
    assert result["best"] == storage.to_json({"step": 4, **scores})
    assert result["final"] == storage.to_json({"step": NUM_STEPS, **worse})
    assert result["num_eval_images"] == 7


def test_records_are_on_disk_before_a_state_that_follows_them(tiny_folder, tmp_path, monkeypatch):
    done = []
    state = {"a": jax.device_put(np.zeros(3, np.float32))}
    record = begun(tiny_folder, tmp_path)
    record.rewind(0)
    monkeypatch.setattr(storage, "sync", lambda file: done.append("sync"))
    monkeypatch.setattr(record.best, "save", lambda *_: done.append("save"))
    monkeypatch.setattr(record.latest, "save", lambda *_: done.append("save"))
    record.score(4, state, {"eval/mean_iou": 0.5, "eval/loss": 0.7}, None, 1.0)
    record.save(4, state)
    record.close()
    assert done == ["sync", "save"] * 2


def test_a_best_state_without_readable_scores_is_set_aside(tiny_folder, tmp_path, caplog):
    state = {"a": jax.device_put(np.zeros(3, np.float32))}
    record = begun(tiny_folder, tmp_path)
    record.rewind(0)
    record.score(4, state, {"eval/mean_iou": 0.5, "eval/loss": 0.7}, None, 1.0)
    record.close()
    (tmp_path / "checkpoints" / "best" / "4" / "about" / "metadata").write_text("{")
    record = begun(tiny_folder, tmp_path)
    record.rewind(5)
    record.score(NUM_STEPS, state, {"eval/mean_iou": 0.25, "eval/loss": 0.7}, None, 1.0)
    record.close()
    assert record.best.steps == [NUM_STEPS]
    assert "the next evaluation's state is the best" in caplog.text
    assert (tmp_path / "checkpoints" / "best.unreadable" / "4").is_dir()


@pytest.mark.parametrize("name", ["checkpoints", "pictures", "tensorboard"])
def test_a_file_in_place_of_a_folder_is_said_at_the_start(tiny_folder, tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{name} is a file, but must be a folder"):
        begun(tiny_folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_data_are_found_from_any_folder(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    begun(tiny_folder.name, tmp_path).latest.close()
    assert files.read(tmp_path, "config.json")["data"]["root"] == str(tiny_folder)
