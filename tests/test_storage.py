"""Tests that interrupted writes leave either the old or the new contents of a file."""

import json

import numpy as np
import pytest

from dense_jax import storage


# 21. MONAI#7504: a class without a score is reported as 0
def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    storage.write_json(path, {"a": np.float64("nan"), "b": [np.int64(3), (1, 2)]})
    assert json.loads(path.read_text()) == {"a": None, "b": [3, [1, 2]]}
    with pytest.raises(TypeError):
        storage.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": None, "b": [3, [1, 2]]}


def test_what_two_write_at_once_is_that_of_one(tmp_path, monkeypatch):
    path, sync = tmp_path / "a.json", storage.sync

    def sync_and_write(file):
        monkeypatch.setattr(storage, "sync", sync)
        storage.write_json(path, {"by": "the other"})
        sync(file)

    monkeypatch.setattr(storage, "sync", sync_and_write)
    storage.write_json(path, {"by": "the one"})
    assert json.loads(path.read_text()) == {"by": "the one"}
    assert [*tmp_path.iterdir()] == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write_half():
        with storage.atomic(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]
