"""Defines the interface of a source: one split of a dataset, with examples read by index.

A source is cheap to create, reads an example only on request, and must be picklable because each
worker process gets a copy.
"""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from dense_jax.labels import Objects
from dense_jax.regions import Regions


class Field(NamedTuple):
    """Describes an additional per-pixel array [h, w, *shape] that each example holds."""

    name: str
    dtype: str = "float32"
    fill: float = 0.0  # the value outside the image
    interpolation: str = "bilinear"  # "bilinear" or "nearest", used by augmentation
    shape: tuple[int, ...] = ()  # of the values of one pixel; () if "nearest"


class Examples(abc.ABC):
    """The part of the `Source` interface that batching needs.

    examples[i] is {"image": `dtype` [h, w, num_channels], "label": int32/uint8 [h, w], "name": str}
    plus an array [h, w, ...] for each of `fields`. Labels are in [0, num_classes) or IGNORE_LABEL. If
    `has_levels`, each example also has `levels`, float32 [2, num_channels]; see `data.levels`. An
    example may have `nodata`, bool [h, w], which marks missing pixels. Their label is IGNORE_LABEL.
    """

    num_channels: int  # 1 (gray), 3 (RGB) or any other number
    dtype: str = "uint8"  # of the images: "uint8", "uint16" or "float32"
    has_levels: bool = False
    fields: tuple[Field, ...] = ()

    @property
    @abc.abstractmethod
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """Returns the height and width of each example in pixels."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, i: int) -> dict[str, Any]: ...


class Wrapper(Examples):
    """The examples of another source, to which a subclass adds something."""

    def __init__(self, source: Examples):
        self.num_channels, self.dtype = source.num_channels, source.dtype
        self.fields, self.has_levels = source.fields, source.has_levels
        self._source = source

    @property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        return self._source.sizes

    def __len__(self) -> int:
        return len(self._source)


class Source(Examples):
    """One split of a dataset, with the names of its classes and other metadata."""

    class_names: tuple[str, ...]
    # The raw value or values of each class in label files. If None, the files hold class indices.
    values: tuple[int | tuple[int, ...], ...] | None = None
    # The values that stand for black and white (gray levels 0 and 255) in images that are not 8-bit.
    value_range: Sequence[float] | None = None
    # The RGB color of each class in pictures. If None, `class_colors` chooses the colors.
    palette: UInt8[np.ndarray, "c 3"] | None = None
    # The unions of classes that a network learns instead of the classes, or None.
    regions: Regions | None = None
    has_instances: bool = False  # whether `instances` exists for this split

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Returns what a network has a logit for: the regions, or the classes without regions."""
        return self.regions.names if self.regions else self.class_names

    @property
    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """Returns the names of the examples."""

    @property
    def fingerprint(self) -> str | None:
        """Returns a hex digest of the files, or None if the data is not read from files.

        The digest changes when the files change and is equal for copies of the files.
        """
        return None

    @property
    def split(self) -> "Source":
        """Returns the whole split of which this source is a part, or else this source."""
        return self

    def instances(self, i: int) -> Objects:
        """Returns the object number of each pixel of example i. `has_instances` must be true."""
        raise NotImplementedError
