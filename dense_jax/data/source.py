"""The contract of a source: one split of a dataset, whose examples are read by their number.

A source is cheap to make, reads an example when asked for it, and can be pickled, because worker
processes get a copy.
"""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from dense_jax.labels import Objects


class Field(NamedTuple):
    """A per-pixel array [h, w] that the examples of a source hold beside image and label."""

    name: str
    dtype: str = "float32"
    fill: float = 0.0  # the value outside the image
    interpolation: str = "bilinear"  # or "nearest"; used when augmentation resamples it


class Examples(abc.ABC):
    """The part of a source that batches are made of.

    examples[i] is {"image": uint8 [h, w, num_channels], "label": int32 or uint8 [h, w], "name": str}
    with labels in [0, num_classes) or IGNORE_LABEL, and one array [h, w] for each of `fields`.
    """

    num_channels: int  # 1 (gray), 3 (RGB) or any other number
    fields: tuple[Field, ...] = ()

    @property
    @abc.abstractmethod
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """The height and width of each example, in pixels."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, i: int) -> dict[str, Any]: ...


class Source(Examples):
    """One split of a dataset, with what its values mean."""

    class_names: tuple[str, ...]
    # The raw value, or values, of each class in label files. None: the files hold classes.
    values: tuple[int | tuple[int, ...], ...] | None = None
    # The values that became 0 and 255 in images that do not have 8 bits.
    value_range: Sequence[float] | None = None
    # The color of each class in pictures, RGB. None: `class_colors` chooses.
    palette: UInt8[np.ndarray, "c 3"] | None = None
    has_instances: bool = False  # whether `instances` exists for this split

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """The name of each example."""

    @property
    def fingerprint(self) -> str | None:
        """A hex digest that changes when the files do, and is the same for a copy of the files.

        None for data that is not read from files.
        """
        return None

    def instances(self, i: int) -> Objects:
        """Returns the object of each pixel of an example. Only where `has_instances` is true."""
        raise NotImplementedError
