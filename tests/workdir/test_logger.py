"""Records survive kills and resumes; a workdir is one process's, and says what is damaged in it."""

import errno
import fcntl
import json
import os

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from dense_jax.workdir import files as workdir
from dense_jax.workdir import logger
from dense_jax.workdir import record as member


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
    records = workdir.read_records(folder / "metrics.jsonl")
    assert records == [{"step": 2, "train/loss": 1.0}, {"step": 3, "train/loss": 0.8}]


def test_pictures_are_png_files_named_by_the_step(folder):
    log = logger.Logger(folder, first_step=0, num_steps=10)
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    log.picture(7, picture)
    log.close()
    np.testing.assert_array_equal(Image.open(folder / "pictures" / "0000007.png"), picture)


# 21. MONAI#7504: a class without a score is reported as 0
def test_json_is_written_whole_or_not_at_all(folder):
    path = folder / "result.json"
    workdir.write_json(path, {"a": np.float64("nan"), "b": [np.int64(3), (1, 2)]})
    assert workdir.read(folder, "result.json") == {"a": None, "b": [3, [1, 2]]}
    with pytest.raises(TypeError):
        workdir.write_json(path, {"a": object()})
    assert workdir.read(folder, "result.json") == {"a": None, "b": [3, [1, 2]]}


def test_a_folder_without_a_run_is_said(folder):
    with pytest.raises(ValueError, match=r"config.json is missing.*--workdir"):
        workdir.read(folder, "config.json")


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00", b"[]", b"null"])
def test_a_damaged_file_is_named_with_the_way_out(folder, content):
    (folder / "config.json").write_bytes(content)
    config = ConfigDict({"data": {"root": ""}})
    for use in (
        lambda: workdir.read(folder, "config.json"),
        lambda: workdir.compare(folder, config),
        lambda: member.Member(folder, config),
    ):
        with pytest.raises(ValueError, match=r"config.json is damaged .*: remove it, and start"):
            use()
    (folder / "config.json").rename(folder / "dataset.json")
    with pytest.raises(ValueError, match=r"dataset.json is damaged"):
        workdir.compare_dataset(folder, {}, "")
    (folder / "dataset.json").rename(folder / "result.json")
    with pytest.raises(ValueError, match=r"result.json is damaged"):
        _ = member.Member(folder, config).result


@pytest.mark.parametrize("line", [b'{"st', b"", b'{"step": \xff}', b"[]", b'{"stop": 2}'])
def test_a_damaged_record_is_said_and_left_out(folder, caplog, line):
    (folder / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n{"ste')
    records = workdir.read_records(folder / "metrics.jsonl")
    assert records == [{"step": 1}, {"step": 3}]
    (warning,) = caplog.messages  # not of the line that a kill cut off
    assert "metrics.jsonl, line 2 is damaged" in warning


def test_what_two_write_at_once_is_that_of_one(folder, monkeypatch):
    path, sync = folder / "a.json", workdir.sync

    def sync_and_write(file):
        monkeypatch.setattr(workdir, "sync", sync)
        workdir.write_json(path, {"by": "the other"})
        sync(file)

    monkeypatch.setattr(workdir, "sync", sync_and_write)
    workdir.write_json(path, {"by": "the one"})
    assert workdir.read_json(path) == {"by": "the one"}
    assert [*folder.iterdir()] == [path]


def test_a_workdir_is_one_process_s(folder):
    (folder / "checkpoints").mkdir()
    with (folder / "checkpoints" / "lock").open("w") as other:
        other.write("process 12 on there")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"test_a_work.* is in use by process 12 on there$"):
            workdir.lock(folder)
    for _ in range(2):  # a second time from one process: a notebook goes on
        workdir.lock(folder)
    with (folder / "checkpoints" / "lock").open("r") as other:
        assert other.read().startswith(f"process {os.getpid()} on ")
        assert not workdir.try_lock(other, folder)
        workdir.unlock(folder)
        assert workdir.try_lock(other, folder)


def test_where_there_are_no_locks_it_goes_on_with_a_warning(folder, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    workdir.lock(folder)
    workdir.unlock(folder)
    assert "No locks available" in caplog.text


@pytest.mark.parametrize("name", ["run [1]", "[a]/run", "x[copy]", "a**b", "a\\b"])
def test_a_path_that_loses_checkpoints_is_refused(folder, name):
    with pytest.raises(ValueError, match=r"^--workdir=.* has '.*' in it: checkpoints cannot"):
        workdir.check_path(folder / name)


@pytest.mark.parametrize(
    "name", ["a b", "(1)", "{x}", "a*", "a?", "é#%,'\"", "a[", "]b[", "~", "$a"]
)
def test_other_names_are_paths_like_any(folder, name):
    assert workdir.check_path(folder / name) == folder / name


def test_seeds_are_found_whatever_the_path(folder):
    path = folder / "x[copy]"
    assert workdir.runs(path) == [path]
    for seed in (10, 9):
        (path / f"seed={seed}").mkdir(parents=True)
    assert [run.name for run in workdir.runs(path)] == ["seed=9", "seed=10"]


@pytest.mark.parametrize("root", ["data", "./data/", "{absolute}/x/../data"])
def test_the_same_data_may_lie_elsewhere(folder, monkeypatch, caplog, root):
    """How the same folder is spelled makes no difference."""
    monkeypatch.chdir(folder)
    dataset = {"class_names": ["a"], "num_channels": 3, "num_examples": 2}
    dataset |= {"fingerprint": "f", "eval_fingerprint": "e"}
    config = ConfigDict({"data": {"root": os.path.abspath("data")}})
    workdir.write_json(folder / "config.json", config.to_dict())
    workdir.write_json(folder / "dataset.json", dataset)
    root = root.format(absolute=os.path.abspath("."))
    for place in (root, "elsewhere"):
        config.data.root = place
        workdir.compare(folder, config)
        workdir.compare_dataset(folder, dataset, place)
    assert not caplog.messages
    for field, split in (("fingerprint", "training"), ("eval_fingerprint", "evaluation")):
        changed = dataset | {field: "other"}
        with pytest.raises(
            ValueError, match=rf"/data to elsewhere: the {split} files.* are others"
        ):
            workdir.compare_dataset(folder, changed, "elsewhere")
        with pytest.raises(ValueError, match=rf"was started: the {split} files.* are others"):
            workdir.compare_dataset(folder, changed, root)


def test_a_run_does_not_go_on_with_labels_that_mean_something_else(folder):
    dataset = {"class_names": ["a", "b"], "values": [0, 1], "fingerprint": "f"}
    workdir.write_json(folder / "dataset.json", dataset)
    with pytest.raises(ValueError, match=r"values was \[0, 1\] and is \[1, 0\]"):
        workdir.compare_dataset(folder, dataset | {"values": (1, 0), "fingerprint": "g"}, "")
