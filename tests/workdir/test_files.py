"""Tests that a workdir belongs to one process, config and dataset, and that damage is reported."""

import errno
import fcntl
import os

import pytest
from etils import epath
from ml_collections import ConfigDict

from dense_jax import storage
from dense_jax.workdir import files
from dense_jax.workdir.record import RunFolder


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def test_a_folder_without_a_run_is_said(folder):
    with pytest.raises(ValueError, match=r"config.json is missing.*--workdir"):
        files.read(folder, "config.json")


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00", b"[]", b"null"])
def test_a_damaged_file_is_named_with_the_way_out(folder, content):
    (folder / "config.json").write_bytes(content)
    config = ConfigDict({"data": {"root": ""}})
    for use in (
        lambda: files.read(folder, "config.json"),
        lambda: files.compare(folder, config),
    ):
        with pytest.raises(ValueError, match=r"config.json is damaged .*: remove it, and start"):
            use()
    (folder / "config.json").rename(folder / "dataset.json")
    with pytest.raises(ValueError, match=r"dataset.json is damaged"):
        files.compare_dataset(folder, {}, "")
    (folder / "dataset.json").rename(folder / "result.json")
    with pytest.raises(ValueError, match=r"result.json is damaged"):
        _ = RunFolder(folder, config).result


def test_a_workdir_of_another_format_is_refused(folder):
    config = ConfigDict({"data": {"root": ""}})
    storage.write_json(folder / "config.json", config.to_dict())
    for about in ({}, {"format_version": files.VERSION}):
        storage.write_json(folder / "environment.json", about)
        files.read(folder, "config.json")
        files.compare(folder, config)
    for version in (files.VERSION + 1, 0, "1", True, None):
        storage.write_json(folder / "environment.json", {"format_version": version})
        for use in (
            lambda: files.read(folder, "config.json"),
            lambda: files.compare(folder, config),
        ):
            with pytest.raises(ValueError, match=r"environment.json has version .* use the dense"):
                use()


@pytest.mark.parametrize("line", [b'{"st', b"", b'{"step": \xff}', b"[]", b'{"stop": 2}'])
def test_a_damaged_record_is_said_and_left_out(folder, caplog, line):
    (folder / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n{"ste')
    records = files.read_records(folder / "metrics.jsonl")
    assert records == [{"step": 1}, {"step": 3}]
    (warning,) = caplog.messages  # not of the line that a kill cut off
    assert "metrics.jsonl, line 2 is damaged" in warning


def test_a_workdir_is_one_process_s(folder):
    (folder / "checkpoints").mkdir()
    with (folder / "checkpoints" / "lock").open("w") as other:
        other.write("process 12 on there")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"test_a_work.* is in use by process 12 on there$"):
            files.lock(folder)
    for _ in range(2):  # a second time from one process: a notebook goes on
        files.lock(folder)
    with (folder / "checkpoints" / "lock").open("r") as other:
        assert other.read().startswith(f"process {os.getpid()} on ")
        assert not storage.try_lock(other, folder)
        files.unlock(folder)
        assert storage.try_lock(other, folder)


def test_where_there_are_no_locks_it_goes_on_with_a_warning(folder, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    files.lock(folder)
    files.unlock(folder)
    assert "No locks available" in caplog.text


@pytest.mark.parametrize("name", ["run [1]", "[a]/run", "x[copy]", "a**b", "a\\b"])
def test_a_path_that_loses_checkpoints_is_refused(folder, name):
    with pytest.raises(ValueError, match=r"^--workdir=.* contains '.*': checkpoints cannot"):
        files.check_path(folder / name)


@pytest.mark.parametrize(
    "name", ["a b", "(1)", "{x}", "a*", "a?", "é#%,'\"", "a[", "]b[", "~", "$a"]
)
def test_other_names_are_paths_like_any(folder, name):
    assert files.check_path(folder / name) == folder / name


def test_seeds_are_found_whatever_the_path(folder):
    path = folder / "x[copy]"
    assert files.runs(path) == [path]
    for seed in (10, 9):
        (path / f"seed={seed}").mkdir(parents=True)
    assert [run.name for run in files.runs(path)] == ["seed=9", "seed=10"]


@pytest.mark.parametrize("root", ["data", "./data/", "{absolute}/x/../data"])
def test_the_same_data_may_lie_elsewhere(folder, monkeypatch, caplog, root):
    """How the same folder is spelled makes no difference."""
    monkeypatch.chdir(folder)
    dataset = {"class_names": ["a"], "num_channels": 3, "num_examples": 2}
    dataset |= {"fingerprint": "f", "eval_fingerprint": "e"}
    config = ConfigDict({"data": {"root": os.path.abspath("data")}})
    storage.write_json(folder / "config.json", config.to_dict())
    storage.write_json(folder / "dataset.json", dataset)
    root = root.format(absolute=os.path.abspath("."))
    for place in (root, "elsewhere"):
        config.data.root = place
        files.compare(folder, config)
        files.compare_dataset(folder, dataset, place)
    assert not caplog.messages
    for field, split in (("fingerprint", "training"), ("eval_fingerprint", "evaluation")):
        changed = dataset | {field: "other"}
        with pytest.raises(
            ValueError, match=rf"/data to elsewhere: the {split} files.* are different"
        ):
            files.compare_dataset(folder, changed, "elsewhere")
        with pytest.raises(ValueError, match=rf"was started: the {split} files.* are different"):
            files.compare_dataset(folder, changed, root)


def test_a_run_does_not_go_on_with_labels_that_mean_something_else(folder):
    dataset = {"class_names": ["a", "b"], "values": [0, 1], "fingerprint": "f"}
    storage.write_json(folder / "dataset.json", dataset)
    with pytest.raises(ValueError, match=r"values was \[0, 1\] and is \[1, 0\]"):
        files.compare_dataset(folder, dataset | {"values": (1, 0), "fingerprint": "g"}, "")


def test_a_run_does_not_go_on_with_regions_in_another_order(folder):
    declared = {"whole": ["a", "b"], "core": ["b"]}
    storage.write_json(folder / "dataset.json", {"regions": declared})
    files.compare_dataset(folder, {"regions": declared}, "")
    with pytest.raises(ValueError, match=r"regions was .*whole.*core.* and is .*core.*whole"):
        files.compare_dataset(folder, {"regions": dict(reversed(declared.items()))}, "")


def test_a_run_goes_on_if_a_new_field_is_none(folder):
    config = ConfigDict({"data": {"root": ""}, "model": {"new": None}})
    storage.write_json(folder / "config.json", {"data": {"root": ""}, "gone": None})
    files.compare(folder, config)
    with pytest.raises(ValueError, match=r"model.new: None there, 1 now"):
        files.compare(folder, ConfigDict({"data": {"root": ""}, "model": {"new": 1}}))
