"""Tests the flags of the main command. test_train tests the training that the command starts."""

import re

import pytest

from dense_jax import command
from tests import forked

MISTAKES = {
    "--config.batchsize=8": "--config.batchsize: no such field. Valid there: .*batch_size",
    "--config.model.up=x": "--config.model.up: no such field. Valid there: .*upsampling",
    "--config.seed.x=1": "--config.seed.x: no such field",
    "--config.num_steps=many": "--config.num_steps=many: invalid literal for int",
    "--config.model.dtype=float16": "model.dtype='float16' is not one of float32, bfloat16",
    "stray": "unexpected arguments: .*stray",
    "--coordinator=host:1": "together; missing: --num_processes, --process_id",
    "--num_processes=2 --process_id=0": "together; missing: --coordinator",
    "--coordinator=host --num_processes=2 --process_id=0": "--coordinator=host must be HOST",
    "--coordinator=h:70000 --num_processes=2 --process_id=0": "a port from 1 to 65535",
    "--coordinator=h:1 --num_processes=2 --process_id=2": "--process_id=2 must be from 0 to",
    "--config=camvid_unett": "no experiment file 'camvid_unett' .*; did you mean 'camvid_unet' or",
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """How the command ends for each mistake, and the workdir that they were given."""
    workdir = tmp_path_factory.mktemp("main") / "run"
    start = [
        *("dense_jax.main", "--config=experiments/camvid_unet.py:reduced"),
        *("--config.data.name=synthetic", f"--workdir={workdir}"),
    ]
    commands = {flag: [*start, *flag.split()] for flag in MISTAKES}
    return forked.run_all(commands, "dense_jax.train"), workdir


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_bad_flag_is_one_clear_error_before_anything_is_written(flag, ended):
    ends, workdir = ended
    assert ends[flag].code == 1
    assert re.search(MISTAKES[flag], ends[flag].err + ends[flag].out)
    assert not workdir.exists()


HANDED_ON = """
import runpy
from dense_jax import train
train.train = lambda config, workdir, experiment: print(config.seed, experiment)
runpy.run_module("dense_jax.main", run_name="__main__", alter_sys=True)
"""


def test_the_experiment_file_is_handed_on(tmp_path):
    file, shared = tmp_path / "mine.py", "from dense_jax.experiments.base import get_config\n"
    file.write_text(shared)
    (tmp_path / "flags").write_text(f"--config={file}\n")
    shipped = str(command.EXPERIMENTS / "camvid_unet.py")
    expected = {
        "--config=camvid_unet:reduced": shipped,
        f"--config {file}": str(file),
        f"--flagfile={tmp_path / 'flags'}": str(file),
    }
    start = ["-c", HANDED_ON, "--config.seed=7", f"--workdir={tmp_path / 'run'}"]
    commands = {words: [*start, *words.split()] for words in expected}
    ends = forked.run_all(commands, "dense_jax.train")
    assert {words: end.out for words, end in ends.items()} == {
        words: f"7 {path}\n" for words, path in expected.items()
    }
