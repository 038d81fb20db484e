"""A part of a source, for evaluations that must be fast."""

from typing import Any

import numpy as np
from jaxtyping import Int32

from dense_jax.data.source import Source


class Subset(Source):
    """`num_examples` evenly spaced examples of a source of n examples.

    Example i is example floor(i * n / num_examples) of the source.
    """

    def __init__(self, source: Source, num_examples: int):
        self._source = source
        self._numbers = np.arange(num_examples) * len(source) // num_examples
        self.num_channels, self.dtype = source.num_channels, source.dtype
        self.class_names = source.class_names
        self.value_range, self.palette = source.value_range, source.palette

    @property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        return self._source.sizes[self._numbers]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._source.names[i] for i in self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._source[int(self._numbers[i])]
