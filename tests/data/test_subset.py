"""Tests the evenly spaced part of a source."""

import pickle

import numpy as np
import pytest

from dense_jax.data import Synthetic
from dense_jax.data.subset import Subset


@pytest.mark.parametrize(
    ("num", "expected"), [(1, [0]), (3, [0, 85, 170]), (256, range(256))], ids=str
)
def test_a_subset_is_evenly_spaced(num, expected):
    source = Synthetic("", "train")
    subset = pickle.loads(pickle.dumps(Subset(source, num)))  # for worker processes
    assert len(source) == 256 and len(subset) == num
    np.testing.assert_array_equal(subset.sizes, source.sizes[list(expected)])
    assert subset.names == tuple(source.names[i] for i in expected)
    for name in ("class_names", "num_channels", "dtype", "value_range", "palette"):
        np.testing.assert_array_equal(getattr(subset, name), getattr(source, name))
    for name, value in subset[num - 1].items():
        np.testing.assert_array_equal(value, source[int(expected[-1])][name])
