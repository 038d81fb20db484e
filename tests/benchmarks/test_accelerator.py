"""Tests that the benchmark of an accelerator goes on where it stopped, at tiny size."""

import json
import sys

import pytest

from benchmarks import accelerator
from dense_jax import data
from dense_jax.sweep import plan


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Calls the benchmark, of which each call has the time for some parts. Returns its commands."""

    def called(num_parts, *failing):
        commands = []

        def run(command, deadline):
            commands.append(command)
            if len(commands) > num_parts:
                return None
            module, part, output = command[0], command[1].removeprefix("--part="), tmp_path / "out"
            if module == "benchmarks.accelerator" and part not in failing:
                found = {"platform": "cpu", "Training": [part, "1", "2", "3", "4", "5", "6"]}
                (output / f"{part}.json").write_text(json.dumps(found))
            return int(part in failing)

        monkeypatch.setattr(accelerator, "run", run)
        (tmp_path / "out").mkdir(exist_ok=True)
        folders = f"--output={tmp_path}/out", f"--workdir={tmp_path}/work"
        monkeypatch.setattr(sys, "argv", ["accelerator", *folders])
        assert accelerator.main() == 0
        return commands

    return called


def test_each_call_goes_on_where_the_last_one_stopped(call, tmp_path, capsys):
    names = [command[1] for command in call(2, "unet64")]
    assert names == ["--part=machine", "--part=unet64", "--part=transposed"]
    assert "the same command goes on" in capsys.readouterr().out
    *parts, table = call(99)
    assert [command[1] for command in parts] == [f"--part={name}" for name in accelerator.PARTS[2:]]
    assert table[0] == "dense_jax.sweep" and f"--kept={tmp_path}/out/segnet_table" in table
    assert "all is done" in capsys.readouterr().out
    assert call(99) == [table]  # which resumes by itself
    page = (tmp_path / "out" / "README.md").read_text()
    assert "unet64: ended with status 1" in page and "| segnet_basic | 1 | 2 |" in page


def test_the_tiny_table_is_one_of_eleven_classes(tmp_path):
    accelerator.write_data(tmp_path)
    source = data.open_dataset("folder", str(tmp_path), "train")
    labels = {label for example in source for label in example["label"].flat}
    assert labels == set(range(11)) and len(plan.load_sweep("camvid_segnet_table")) == 48


def test_transposed_convolutions_are_timed_with_their_gradients():
    ((shape, kernel, ours, flax, _),) = accelerator.transposed(tiny=True)["rows"]
    assert (shape, kernel) == ("1 x 8² x 4", "2²") and float(ours) > 0 and float(flax) > 0
