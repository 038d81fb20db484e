"""The command's flags; what they start is tested with `train`."""

import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.batchsize=8", "--config.batchsize: no such field. Valid there: .*batch_size"),
        ("--config.model.up=x", "--config.model.up: no such field. Valid there: .*upsampling"),
        ("--config.seed.x=1", "--config.seed.x: no such field"),
        ("--config.num_steps=many", "--config.num_steps=many: invalid literal for int"),
        ("--config.model.dtype=float16", "model.dtype: 'float16' is not one of 'float32', 'bf"),
        ("stray", "unexpected arguments: .*stray"),
        ("--coordinator=host:1", "together; missing: --num_processes, --process_id"),
        ("--num_processes=2 --process_id=0", "together; missing: --coordinator"),
        ("--coordinator=host --num_processes=2 --process_id=0", "--coordinator=host must be HOST"),
        ("--coordinator=h:70000 --num_processes=2 --process_id=0", "a port from 1 to 65535"),
        ("--coordinator=h:1 --num_processes=2 --process_id=2", "--process_id=2 must be from 0 to"),
    ],
)
def test_a_bad_flag_is_one_clear_error_before_anything_is_written(flag, message, tmp_path):
    command = [
        *(sys.executable, "-m", "dense_jax.main", "--config=experiments/camvid_unet.py:reduced"),
        *("--config.data.name=synthetic", f"--workdir={tmp_path}/run", *flag.split()),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.search(message, done.stderr + done.stdout)
    assert not (tmp_path / "run").exists()
