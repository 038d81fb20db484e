"""A part of a source, such as a fold, or few images for evaluations that must be fast."""

import functools
import hashlib
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer

from dense_jax.data.source import Source
from dense_jax.labels import Objects


class Subset(Source):
    """The examples of a source with the given numbers, in their order."""

    def __init__(self, source: Source, numbers: Integer[np.ndarray, "k"]):
        self._source, self._numbers = source, numbers
        self.num_channels, self.dtype = source.num_channels, source.dtype
        self.class_names, self.values = source.class_names, source.values
        self.value_range, self.palette = source.value_range, source.palette
        self.has_instances, self.regions = source.has_instances, source.regions

    @property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        return self._source.sizes[self._numbers]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._source.names[i] for i in self._numbers)

    @functools.cached_property
    def fingerprint(self) -> str | None:
        if (whole := self._source.fingerprint) is None:
            return None
        return hashlib.sha256(f"{whole} {self._numbers.tolist()}".encode()).hexdigest()

    @property
    def split(self) -> Source:
        return self._source.split

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._source[int(self._numbers[i])]

    def instances(self, i: int) -> Objects:
        return self._source.instances(int(self._numbers[i]))


def evenly_spaced(source: Source, num_examples: int) -> Subset:
    """Returns examples floor(i * n / num_examples), i < num_examples, of the n of a source."""
    return Subset(source, np.arange(num_examples) * len(source) // num_examples)
