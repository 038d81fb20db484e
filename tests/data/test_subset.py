"""Tests the evenly spaced part of a source."""

import pickle

import numpy as np
import pytest

from dense_jax.data import Synthetic
from dense_jax.data.subset import Subset, evenly_spaced


@pytest.mark.parametrize(
    ("num", "expected"), [(1, [0]), (3, [0, 85, 170]), (256, range(256))], ids=str
)
def test_a_subset_is_evenly_spaced(num, expected):
    source = Synthetic("", "train")
    subset = pickle.loads(pickle.dumps(evenly_spaced(source, num)))  # for worker processes
    assert len(source) == 256 and len(subset) == num
    np.testing.assert_array_equal(subset.sizes, source.sizes[list(expected)])
    assert subset.names == tuple(source.names[i] for i in expected)
    for name in ("class_names", "num_channels", "dtype", "value_range", "palette", "values"):
        np.testing.assert_array_equal(getattr(subset, name), getattr(source, name))
    for name, value in subset[num - 1].items():
        np.testing.assert_array_equal(value, source[int(expected[-1])][name])


class Filed(Synthetic):
    """A source with a fingerprint and instances."""

    fingerprint = "abc"
    has_instances = True

    def instances(self, i):
        return np.full((2, 2), i, np.int32)


def test_a_subset_has_a_fingerprint_of_its_own_and_its_instances():
    source = Filed("", "train")
    first, other, same = (Subset(source, np.array(n)) for n in ([4, 9], [4, 8], [4, 9]))
    assert first.fingerprint == same.fingerprint
    assert len({first.fingerprint, other.fingerprint, source.fingerprint}) == 3
    assert Subset(Synthetic("", "train"), np.array([4])).fingerprint is None
    assert first.has_instances and first.instances(1).tolist() == [[9, 9], [9, 9]]
    assert evenly_spaced(first, 1).split is source is source.split
