"""Tests that positions are reflected in the same way in NumPy and JAX arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.geometry import reflect


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_reflects_as_numpy_pads(length, array):
    expected = np.pad(np.arange(length), 20, mode="reflect")
    np.testing.assert_array_equal(reflect(array(np.arange(-20, length + 20)), length), expected)
