"""Tests that training and evaluation need nothing that Linux has and macOS has not, by hiding it."""

import os
import shlex
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

# Python runs a module of this name at its start, also in worker processes.
SITECUSTOMIZE = """
import ctypes, os, sys

for name in dir(os):
    if name.startswith(("sched_", "SCHED_", "memfd_", "posix_fa", "eventfd", "pidfd", "splice")):
        delattr(os, name)


def hide(event, arguments):
    if event == "open" and str(arguments[0]).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(arguments[0])


def find(library, name, find=ctypes.CDLL.__getattr__):
    if name in ("mallopt", "prctl", "malloc_trim"):
        raise AttributeError(name)
    return find(library, name)


sys.addaudithook(hide)
ctypes.CDLL.__getattr__ = find
"""
# Several processes at once: sharing the cores, and measuring images.
POOL = """
import os

import numpy as np

from dense_jax.evaluation import per_image
from dense_jax.sweep import jobs

if __name__ == "__main__":
    shares = jobs.shares(2) if os.cpu_count() > 1 else [jobs.Share(frozenset({0}))]
    assert jobs.Runner([jobs.Job("a", jobs.epath.Path("a"), [["true"]])], shares).run() == 0
    pool = per_image.Pool(2)
    pool.submit(0, np.eye(8, dtype=np.uint8), np.eye(8, dtype=np.uint8))
    print(pool.results()["boundary_f1"])
    pool.close()
"""
TRAIN = (
    "-m dense_jax.main --config=unet_dice --workdir=run --config.num_steps=2 --config.batch_size=2"
    " --config.data.cache=host --config.data.workers=1 --config.model.widths=(2,2)"
    " --config.model.convs_per_level=1 --config.data.crop_size=(16,16) --config.data.name=folder"
    " --config.optimizer.warmup_steps=0 --config.eval.num_pictures=1 --config.data.root={root}"
)


@pytest.mark.parametrize("arguments", [TRAIN, "pool.py"], ids=["training", "processes"])
def test_what_only_linux_has_is_not_needed(arguments, tmp_path, tiny_folder):
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (tmp_path / "pool.py").write_text(POOL)
    done = subprocess.run(
        [sys.executable, *shlex.split(arguments.format(root=tiny_folder))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
