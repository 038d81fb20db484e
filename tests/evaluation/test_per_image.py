"""Tests that measuring images in worker processes gives the same results as in this process."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from dense_jax.evaluation import per_image
from dense_jax.labels import IGNORE_LABEL
from tests.conftest import REPOSITORY

SCRIPT = """
import sys
import jax
import numpy as np
from dense_jax import data
from dense_jax.evaluation import per_image

# Not under `if __name__ == "__main__"`: imported by each process, this would not end.
source = data.Synthetic(None, "test", size=(24, 24), num_examples=20)
predictions = [np.roll(source[i]["label"], i, axis=0).astype(np.uint8) for i in range(20)]
pool = per_image.Pool(6, [1, 2])
for i in reversed(range(20)):
    pool.submit(i, predictions[i], source[i]["label"])
measured = pool.results()
for i in range(20):
    expected = per_image.measure(predictions[i], source[i]["label"], 6, [1, 2])
    for name, values in expected.items():
        np.testing.assert_array_equal(measured[name][i], values)
assert sys.modules["__main__"].__file__ == __file__
print("jax" in sys.modules, pool._pool.submit(eval, "'jax' in __import__('sys').modules").result())
pool.close()
"""

KILLED = """
import os
import signal
import numpy as np
from dense_jax.evaluation import per_image

pool = per_image.Pool(2)
for i in range(4):
    pool.submit(i, *np.zeros((2, 9, 9), np.uint8))
pool.results()
print(len(pool._pool._processes), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def run(script, path):
    """Runs a script. Its processes share its pipes, so that this waits for them to end, too."""
    path.write_text(script)
    return subprocess.run(
        [sys.executable, path],
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("shape", [(16, 32), (40, 21), (3, 5)], ids=str)
def test_errors_are_counted_by_phase(shape):
    rng = np.random.default_rng(0)
    label, prediction = rng.integers(0, 3, (2, *shape)).astype(np.uint8)
    label[rng.random(shape) < 0.2] = IGNORE_LABEL
    errors = per_image.phase_errors(prediction, label)
    for y in range(16):
        for x in range(16):
            truth, guess = label[y::16, x::16], prediction[y::16, x::16]
            valid = truth != IGNORE_LABEL
            assert errors[y, x].tolist() == [(truth != guess)[valid].sum(), valid.sum()]


def test_processes_measure_the_same_and_import_neither_jax_nor_the_main_module(tmp_path):
    done = run(SCRIPT, tmp_path / "script.py")
    assert (done.returncode, done.stdout.split()) == (0, ["True", "False"]), done.stderr


def test_processes_end_when_evaluation_is_killed(tmp_path):
    done = run(KILLED, tmp_path / "killed.py")
    assert done.returncode == -signal.SIGKILL and int(done.stdout) > 0, done.stderr
