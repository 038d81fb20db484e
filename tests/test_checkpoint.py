"""Saving to a disk that is full."""

import contextlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.checkpoint import Checkpoints

STATE = {"weights": jnp.arange(5000.0), "step": jnp.ones((), jnp.int32)}


@contextlib.contextmanager
def full_disk():
    """No file may hold more than 2000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Where one of several writes has failed, tensorstore may tell of the others when nobody listens.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_said_and_harms_no_older_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, max_to_keep=1)
    checkpoints.save(1, STATE)
    checkpoints.wait()
    with full_disk(), pytest.raises(OSError, match=r"cannot save to .* of steps \[1\]"):
        checkpoints.save(2, STATE)
        checkpoints.wait()

    again = Checkpoints(tmp_path, max_to_keep=1)
    like = jax.eval_shape(lambda: STATE)
    restored = again.restore_latest(like)
    jax.tree.map(np.testing.assert_array_equal, restored, STATE)
    again.save(2, STATE)
    again.close()
    assert Checkpoints(tmp_path).steps == [2]
