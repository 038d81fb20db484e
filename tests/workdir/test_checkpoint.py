"""Tests saving to a disk that is full, and reading checkpoints that are damaged."""

import contextlib
import math
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.workdir.checkpoint import Checkpoints, digests
from tests.conftest import mesh_of

STATE = {"weights": jnp.arange(5000.0), "step": jnp.ones((), jnp.int32)}


def like(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


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
    restored = again.restore_latest(like(STATE))
    jax.tree.map(np.testing.assert_array_equal, restored, STATE)
    again.save(2, STATE)
    again.close()
    assert Checkpoints(tmp_path).steps == [2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of an array that is stored as it is: it cannot be compressed."""
    noise = np.random.default_rng(0).integers(2**32, size=5000, dtype=np.uint32)
    state = {"noise": jax.device_put(noise)}
    directory = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, state, {"a": 0.25, "b": math.nan})
    checkpoints.close()
    return directory, state


def flip_a_bit(directory, there: bytes) -> None:
    """Of these bytes, in the one file that has them."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    (file,) = (path for path in files if there in path.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.index(there) + len(there) // 2] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_is_noticed_and_the_array_named(saved, tmp_path):
    state = saved[1]
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    flip_a_bit(tmp_path, np.asarray(state["noise"]).tobytes()[2000:2100])
    with pytest.raises(ValueError, match=r"checkpoint .*/1: the disk returns other .* of noise"):
        Checkpoints(tmp_path).restore(1, like(state))


def test_scores_come_back_or_are_refused(saved, tmp_path):
    scores = Checkpoints(saved[0]).scores(1)
    assert scores["a"] == 0.25 and math.isnan(scores["b"])
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    flip_a_bit(tmp_path, b"0.25")
    with pytest.raises(ValueError, match="is damaged"):
        Checkpoints(tmp_path).scores(1)


def test_a_checkpoint_without_digests_is_refused(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "1" / "about")
    with pytest.raises(ValueError, match="cannot read checkpoint"):
        Checkpoints(tmp_path).restore(1, like(saved[1]))


def test_a_second_damaged_checkpoint_of_a_step_is_no_dead_end(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "latest")
    for _ in range(3):
        shutil.copytree(saved[0] / "1", tmp_path / "latest" / "2")
        shutil.rmtree(tmp_path / "latest" / "2" / "about")
        restored = Checkpoints(tmp_path / "latest").restore_latest(like(saved[1]))
        jax.tree.map(np.testing.assert_array_equal, restored, saved[1])
    names = {path.name for path in (tmp_path / "latest.unreadable").iterdir()}
    assert names == {"2", "2.1", "2.2"}


# Orbax raises the error while other arrays are still being read, and leaves them behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_first_checkpoint_that_is_not_all_there_is_said(tmp_path):
    checkpoints = Checkpoints(tmp_path / "[1]")  # which orbax takes for a pattern
    checkpoints.save(1, STATE)
    with pytest.raises(OSError, match=r"1\]/1 was written, but cannot be read"):
        checkpoints.wait()


def test_a_checkpoint_is_read_where_none_can_be_saved(saved, tmp_path):
    copy = shutil.copytree(saved[0], tmp_path / "x[copy]" / "latest")
    restored = Checkpoints(copy).restore(1, like(saved[1]))
    jax.tree.map(np.testing.assert_array_equal, restored, saved[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_every_bit_changes_the_digest_and_devices_do_not(dtype):
    rng = np.random.default_rng(0)
    array = (100 * rng.random((8, 5))).astype(jnp.dtype(dtype))

    def digest(array, spec=()):
        sharding = jax.sharding.NamedSharding(mesh_of(4), jax.sharding.PartitionSpec(*spec))
        (value,) = digests({"a": jax.device_put(array, sharding)}).values()
        return value

    whole = digest(array)
    assert digest(array, ["data"]) == whole != digest(array[::-1])
    for byte in range(array.nbytes):
        flipped = bytearray(array.tobytes())
        flipped[byte] ^= 1 << rng.integers(8)
        assert digest(np.frombuffer(flipped, array.dtype).reshape(array.shape)) != whole
    assert digest(array[0, 0]) != digest(array[0, 1])
