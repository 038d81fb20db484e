"""Tests that exported programs measure the same levels of an image as `data.levels`."""

import jax
import numpy as np
import pytest

from dense_jax.data import levels
from dense_jax.inference import traced_levels

RNG = np.random.default_rng(0)
IMAGES = {
    "8 bits": RNG.integers(0, 256, (3, 30, 41, 3)).astype(np.uint8),
    "16 bits, far from 0": RNG.integers(60000, 60500, (2, 30, 41, 1)).astype(np.uint16),
    "constant": np.full((1, 9, 9, 1), 7, np.uint8),
    "a pixel of floats": np.zeros((1, 1, 1, 2), np.float32),
}


@pytest.mark.parametrize("max_samples", [2**20, 100])
@pytest.mark.parametrize("name", levels.PER_IMAGE)
def test_levels_are_those_of_the_host(name, max_samples, monkeypatch):
    monkeypatch.setattr(levels, "MAX_SAMPLES", max_samples)
    for images in IMAGES.values():
        facts = {"num_channels": images.shape[-1], "dtype": images.dtype.name, "value_range": None}
        levels_of = levels.rule(name, facts)
        expected = np.stack([levels_of([image], image.shape[:2]) for image in images])
        found = jax.jit(lambda x, levels_of=levels_of: traced_levels.measure(x, levels_of))(images)
        span = expected[:, 1:] - expected[:, :1]
        off = np.abs(found - expected) / np.maximum(span, 1e-6 * abs(expected).max())
        assert found.shape == expected.shape and off.max() < 1e-4
