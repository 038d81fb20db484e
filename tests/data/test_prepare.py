"""Tests how the prepare command calls TFDS, and the errors if something is missing."""

import subprocess
import sys
import types

import pytest
import tensorflow_datasets as tfds

from dense_jax.data import prepare as command
from dense_jax.data.prepare import prepare


class Builder:
    """A stand-in for TFDS's builder: remembers its calls, and raises `error` if there is one."""

    def __init__(self, error=None):
        self.error, self.calls = error, []

    def __call__(self, name, **options):
        self.calls.append((name, options))
        return self

    def download_and_prepare(self):
        self.calls.append("prepared")
        if self.error:
            raise self.error


def test_prepares_as_array_record(monkeypatch, capsys):
    builder = Builder()
    monkeypatch.setattr(tfds, "builder", builder)
    prepare("oxford_iiit_pet", "somewhere")
    options = {"data_dir": "somewhere", "file_format": "array_record"}
    assert builder.calls == [("oxford_iiit_pet", options), "prepared"]
    assert (
        "--config.data.name=oxford_iiit_pet --config.data.root=somewhere" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "error, words",
    [
        (ConnectionError("name not resolved"), "name not resolved.*needs the network"),
        (ModuleNotFoundError("No module named 'tensorflow'"), "needs a package.*'tensorflow'"),
    ],
)
def test_failures_say_what_is_missing(monkeypatch, error, words):
    monkeypatch.setattr(tfds, "builder", Builder(error))
    with pytest.raises(OSError, match=words):
        prepare("oxford_iiit_pet", "somewhere")


def test_the_command_asks_for_an_output(monkeypatch):
    for name, max_side in (("folder", None), ("oxford_iiit_pet", 8)):
        given = types.SimpleNamespace(name=name, root="x", output=None, max_side=max_side)
        monkeypatch.setattr(command.flags, "FLAGS", given)
        with pytest.raises(ValueError, match="--output is missing"):
            command.main([])


def test_the_command_lists_the_datasets():
    words = [sys.executable, "-m", "dense_jax.data.prepare", "--name=pets", "--root=x"]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode != 0 and "oxford_iiit_pet" in done.stderr
