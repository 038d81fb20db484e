"""Shared by every test: four CPU devices, strict rank promotion, little time spent in XLA."""

import os
import pathlib

import jax
import pytest
from absl import flags

# Tests are about values, not speed, and most of their time is compilation.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)
flags.FLAGS.mark_as_parsed()

REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """Tests never read or write the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder that holds `camvid` and `isbi2012`, in the folder layout; skips without it."""
    root = os.environ.get("DENSE_JAX_DATA", "")
    if not root:
        pytest.skip("needs real images: set DENSE_JAX_DATA to a folder with camvid and isbi2012")
    return pathlib.Path(root)
