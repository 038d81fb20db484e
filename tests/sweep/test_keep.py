"""Tests that kept runs are small and portable, and that only runs of the sweep's own are taken."""

import json
import os
import re

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from dense_jax.sweep import keep, plan

ROOT = "/home/someone/camvid"
ALWAYS = {"config.json", "dataset.json", "environment.json", "cost.json", "result.json"}
KEPT = {*ALWAYS, "metrics.jsonl", "evaluation_test.json", "evaluation_test.npz"}


MEASURED = {
    "names": np.array(["a", "b"]),
    "confusion_matrices": np.arange(8).reshape(2, 2, 2),
    "phase_errors": np.ones((2, 16, 16, 2), np.int64),
    "boundary_f1": np.zeros((2, 2)),
}


def config_of(seed=0, **fields):
    data = {"root": ROOT, "workers": 0}
    return ConfigDict({"seed": seed, "num_steps": 5, "num_seeds": 1, "data": data} | fields)


def write_run(folder, seed=0, score=0.5):
    """Writes the files of a finished and evaluated run, as training does."""
    (folder / "checkpoints" / "best").mkdir(parents=True)
    evaluated = (f"evaluation_test.{ending}" for ending in ("md", "zip", "png"))
    for name in ("learning_curve.png", "log.txt", *evaluated):
        (folder / name).write_text("content")
    np.savez(folder / "evaluation_test.npz", **MEASURED)
    lines = {"step": 1, "train/loss": 2.0}, {"step": 5, "eval/mean_iou": score, "eval/a": None}
    contents = {
        "config.json": config_of(seed).to_dict(),
        **{name: {} for name in ALWAYS - {"config.json", "result.json"}},
        "result.json": {"status": "finished", "best": {"eval/mean_iou": score}},
        "evaluation_test.json": {"root": ROOT, "eval/mean_iou": 0.1 + 0.2},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return epath.Path(folder)


@pytest.fixture
def kept(tmp_path):
    folder = epath.Path(tmp_path / "kept" / "a")
    keep.save(write_run(tmp_path / "runs" / "a"), folder)
    return folder


def test_what_is_kept_is_small_and_says_nothing_of_the_machine(kept):
    assert {path.name for path in kept.iterdir()} == KEPT
    texts = {path.name: path.read_bytes() for path in kept.iterdir()}
    assert not any(b"/home" in text for text in texts.values())
    config, evaluation = (
        json.loads(texts[f"{name}.json"]) for name in ("config", "evaluation_test")
    )
    assert config == config_of(data={"root": "camvid", "workers": 0}).to_dict()
    assert evaluation == {"root": "camvid", "eval/mean_iou": 0.1 + 0.2}
    record = {"step": 5, "eval/mean_iou": 0.5, "eval/a": None}
    assert json.loads(texts["metrics.jsonl"]) == record
    with np.load(kept / "evaluation_test.npz") as arrays:
        assert arrays.keys() == {"names", "confusion_matrices", "phase_errors"}
        for name in ("names", "confusion_matrices"):
            np.testing.assert_array_equal(arrays[name], MEASURED[name])
        assert (arrays["phase_errors"] == 2).all() and len(arrays["phase_errors"]) == 1


def test_a_kept_run_is_finished_and_evaluated_elsewhere(kept, tmp_path):
    for path in kept.iterdir():
        os.utime(path, (9, 9))  # as after a checkout, all files are as old
    workdir = epath.Path(tmp_path / "elsewhere" / "a")
    moved = config_of(data={"root": "/mnt/CamVid", "workers": 3})
    keep.restore(kept, workdir, moved, "test")
    assert plan.status(workdir) == "finished" and plan.is_evaluated(workdir, "test")
    again = epath.Path(tmp_path / "again")
    keep.save(workdir, again)
    for path in again.iterdir():
        assert path.read_bytes() == (kept / path.name).read_bytes()
    keep.restore(kept, workdir, moved, "test")  # it is there


def test_nothing_is_restored_from_where_nothing_is_complete(kept, tmp_path):
    keep.restore(epath.Path(tmp_path / "none"), epath.Path(tmp_path / "new"), config_of(), None)
    (kept / "config.json").unlink()  # written last
    keep.restore(kept, epath.Path(tmp_path / "new"), config_of(), None)
    assert not (tmp_path / "new").exists()


def test_a_kept_run_of_another_config_is_refused(kept, tmp_path):
    workdir = epath.Path(tmp_path / "new")
    with pytest.raises(
        ValueError, match=r"kept/a has a run of another config.*\n  num_steps: 5 th"
    ):
        keep.restore(kept, workdir, config_of(num_steps=6), None)
    with pytest.raises(ValueError, match="a has 1 seeds, but num_seeds=2"):
        keep.restore(kept, workdir, config_of(num_seeds=2), None)
    with pytest.raises(ValueError, match=r"a was not evaluated on val, .*without --evaluate=val"):
        keep.restore(kept, workdir, config_of(), "val")
    assert not workdir.exists()


@pytest.mark.parametrize("result", [None, "{}"])
def test_a_run_that_is_there_is_neither_replaced_nor_doubled(kept, tmp_path, result):
    workdir = epath.Path(tmp_path / "runs" / "a")
    (workdir / "result.json").unlink()
    if result:
        (workdir / "result.json").write_text(result)
    message = f"{workdir} and {kept} are not the same run: remove one"
    with pytest.raises(ValueError, match=re.escape(message)):
        keep.restore(kept, workdir, config_of(), None)


def test_the_seeds_of_a_run_are_kept_each(tmp_path):
    source, kept, workdir = (epath.Path(tmp_path / name) for name in ("runs", "kept", "new"))
    for seed in (7, 8):
        write_run(tmp_path / "runs" / f"seed={seed}", seed, score=seed / 10)
    keep.save(source, kept)
    keep.restore(kept, workdir, config_of(7, num_seeds=2), "test")
    assert plan.is_evaluated(workdir, "test")
    assert json.loads((workdir / "seed=8" / "config.json").read_text())["seed"] == 8


def test_where_the_data_is_does_not_tell_two_sweeps_apart():
    def sweep(root):
        return {"flags": {"data.root": root, "x": "1"}, "runs": {"a": {"data.root": root, "y": 2}}}

    assert keep.portable(sweep("/a")) == keep.portable(sweep("/b"))
    assert keep.portable(sweep("/a")) == {"flags": {"x": "1"}, "runs": {"a": {"y": 2}}}
