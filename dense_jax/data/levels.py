"""Finds which values of an image become the gray levels 0 and 255 on the device, and stores them.

The *levels* of an image are float32 [2, c]: for each channel, the value that becomes 0 and the
value that becomes 255. `models.normalization.to_gray_levels` applies them. Values outside are not
clipped.
How levels are found depends on `config.model.normalization`:

    image         mean - 2 sd and mean + 2 sd of the image, so that the network sees (x - mean) / sd
    percentiles   the 1st and the 99th percentile of the image
    dataset       as "image", but of all images of the training split together
    other names   the range in dataset.json. 8-bit images have no levels: their values are gray levels.

A floor keeps the network's input finite for an image that is constant: sd, and the distance between
the percentiles, are at least 1 gray level of the range in dataset.json. The range of 8-bit images is
0 to 255. If there is no range, it is that of the image's own values.

Statistics are of the whole image as it is stored, on a regular grid of at most 2^20 pixels. Pixels
that are masked as nodata do not count, and get the value halfway between the levels. Statistics
never depend on padding, crops or tiles, or on how the image is read. Only NumPy is used.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Shaped, UInt8

from dense_jax.data import verify
from dense_jax.data.decode import Range
from dense_jax.data.source import Examples, Source, Wrapper

Image = Shaped[np.ndarray, "h w c"]
Samples = Shaped[np.ndarray, "c n"]
Levels = Float32[np.ndarray, "2 c"]
MAX_SAMPLES = 2**20  # pixels of an image


class _Moments(NamedTuple):
    """The moments and extremes of each channel of an image, or of several images together."""

    count: int
    mean: Float64[np.ndarray, " c"]
    variance: Float64[np.ndarray, " c"]
    low: Float64[np.ndarray, " c"]
    high: Float64[np.ndarray, " c"]

    def levels(self, limits: Range | None) -> Levels:
        """Returns mean - 2 sd and mean + 2 sd. `limits` is the range of all values, if known."""
        sd = np.maximum(np.sqrt(self.variance), _floor(self.low, self.high, limits))
        return np.stack([self.mean - 2 * sd, self.mean + 2 * sd]).astype(np.float32)


def _percentiles(samples: Samples, limits: Range | None) -> Levels:
    low, high = np.percentile(samples.astype(np.float64), (1, 99), axis=1)
    floor = _floor(samples.min(axis=1), samples.max(axis=1), limits)
    missing = np.maximum(floor - (high - low), 0) / 2
    return np.stack([low - missing, high + missing]).astype(np.float32)


# The normalizations whose levels are measured: in each image, and in the training split.
PER_IMAGE: dict[str, Callable[[Samples, Range | None], Levels]] = {
    "image": lambda samples, limits: _moments(samples).levels(limits),
    "percentiles": _percentiles,
}
MEASURED = (*PER_IMAGE, "dataset")


def are_needed(normalization: str, dtype: str) -> bool:
    """Returns whether images of a dtype have levels."""
    return normalization in MEASURED or dtype != "uint8"


class Rule(NamedTuple):
    """How the levels of images are found: rule(strips, size) returns the levels of one image.

    strips: The image in one or more strips of rows, from top to bottom.
    size: The height and width of the image in pixels.
    """

    normalization: str
    limits: Range | None  # the range of all values, if known
    fixed: Levels | None = None  # the levels of all images, if not measured in each image

    def __call__(self, strips: Iterable[Image], size: Iterable[int]) -> Levels:
        if self.fixed is not None:
            return self.fixed
        return PER_IMAGE[self.normalization](_sample(strips, size), self.limits)

    def read(
        self, strips: Callable[[], Iterator[Image]], size: Iterable[int]
    ) -> tuple[Levels, Iterator[Image]]:
        """Returns the levels of an image and its strips. Reads an image of several strips twice."""
        height, _ = size
        if self.fixed is not None:
            return self.fixed, strips()
        parts = strips()
        first = next(parts)
        levels = self(itertools.chain([first], parts), size)
        return levels, iter([first]) if len(first) == height else strips()


def rule(normalization: str, dataset: Mapping[str, Any]) -> Rule | None:
    """Returns the rule for a normalization, or None if images have no levels.

    dataset: The content of a run's dataset.json, or of its fields num_channels, dtype, value_range
      and, if the normalization is "dataset", levels.

    Raises ValueError if images are not 8-bit and have no range, but the normalization needs one.
    """
    dtype, value_range, c = (dataset[name] for name in ("dtype", "value_range", "num_channels"))
    limits = (0, 255) if dtype == "uint8" else value_range
    if normalization in PER_IMAGE:
        return Rule(normalization, limits)
    if normalization == "dataset":
        levels = np.array(dataset["levels"], np.float32).reshape(2, c)
        return Rule(normalization, limits, levels)
    if dtype == "uint8":
        return None
    if value_range is None:
        raise ValueError(
            f"the images hold {dtype} values, not 8 bits, and model.normalization="
            f"{normalization!r} needs to know which of them become 0 and 255 in all images: write "
            '"range": [LOW, HIGH] into dataset.json, or measure it in each image with '
            "--config.model.normalization=percentiles"
        )
    levels = np.repeat(np.array(value_range, np.float32)[:, None], c, axis=1)
    return Rule(normalization, limits, levels)


def of_split(source: Source) -> Levels:
    """Returns the levels mean - 2 sd and mean + 2 sd of all images of a source together.

    Raises ValueError if an example is invalid.
    """

    def moments(example: dict[str, Any]) -> _Moments:
        image = _masked(example)
        return _moments(_sample([image], image.shape[:2]))

    def measure() -> Levels:
        limits = (0, 255) if source.dtype == "uint8" else source.value_range
        return _together(verify.scan(source, moments)).levels(limits)

    return verify.cached(source, f"levels/{source.dtype}", measure)


class WithLevels(Wrapper):
    """A source with the levels of each image added to its example."""

    def __init__(self, source: Examples, levels_of: Rule):
        super().__init__(source)
        self.has_levels, self._rule = True, levels_of

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = self._source[i]
        image = _masked(example)
        levels = self._rule([image], image.shape[:2])
        return example | {"image": filled(image, levels), "levels": levels}


def _masked(example: Mapping[str, Any]) -> Image:
    """Returns the image of an example, as a masked array if some of its pixels are nodata."""
    image, nodata = example["image"], example.get("nodata")
    if nodata is None:
        return image
    return np.ma.array(image, mask=np.broadcast_to(nodata[..., None], image.shape))


def filled(image: Image, levels: Levels | None) -> Image:
    """Returns an image with the value halfway between the levels where it is masked.

    Without levels, masked pixels stay as they are.
    """
    if levels is None or not isinstance(image, np.ma.MaskedArray):
        return np.ma.getdata(image)
    middle = levels.mean(axis=0)
    if image.dtype.kind == "u":  # a range may reach beyond the dtype
        middle = middle.clip(0, np.iinfo(image.dtype).max)
    return np.where(np.ma.getmaskarray(image), middle.astype(image.dtype), image.data)


def with_levels(source: Examples, levels_of: Rule | None) -> Examples:
    """Returns the source with levels, or the source itself if its images have none."""
    return source if levels_of is None else WithLevels(source, levels_of)


def picture(
    image: Image, *, value_range: Range | None = None, levels: Levels | None = None
) -> UInt8[np.ndarray, "h w c"]:
    """Returns an image as 8-bit values, to look at. 8-bit images stay as they are.

    Other images are shown by their levels. If `levels` is None, these are the two values of the
    range, or without a range the image's percentiles.
    """
    if image.dtype == np.uint8:
        return image
    if levels is None:
        name = "unit" if value_range else "percentiles"
        facts = {"num_channels": image.shape[2], "dtype": image.dtype.name}
        levels_of: Any = rule(name, facts | {"value_range": value_range})
        levels = levels_of([image], image.shape[:2])
    low, high = levels
    return ((image - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)


def stride(height: int, width: int) -> int:
    """Returns the distance of the rows and columns on which an image's statistics are measured."""
    return next(k for k in itertools.count(1) if -(-height // k) * -(-width // k) <= MAX_SAMPLES)


def _sample(strips: Iterable[Image], size: Iterable[int]) -> Samples:
    """Returns the pixels in every k-th row and column, for the smallest k that is enough."""
    k = stride(*map(int, size))
    start, parts = 0, []
    for strip in strips:
        parts.append(strip[-start % k :: k, ::k].reshape(-1, strip.shape[2]))
        start += len(strip)
    if any(isinstance(part, np.ma.MaskedArray) for part in parts):
        samples = np.ma.concatenate(parts)
        valid = ~np.ma.getmaskarray(samples)[:, 0]
        parts = [samples.data[valid] if valid.any() else samples.data]
    return np.ascontiguousarray(np.concatenate(parts).T)  # so that sums have one order


def _moments(samples: Samples) -> _Moments:
    x = samples.astype(np.float64)
    statistics = (function(x, axis=1) for function in (np.mean, np.var, np.min, np.max))
    return _Moments(samples.shape[1], *statistics)


def _together(parts: list[_Moments]) -> _Moments:
    """Returns the moments of several groups of pixels together."""
    counts, means, variances, lows, highs = map(np.array, zip(*parts, strict=True))
    shares = counts / counts.sum()
    mean = shares @ means
    variance = shares @ (variances + (means - mean) ** 2)
    return _Moments(int(counts.sum()), mean, variance, lows.min(axis=0), highs.max(axis=0))


def _floor(
    low: Shaped[np.ndarray, " c"], high: Shaped[np.ndarray, " c"], limits: Range | None
) -> Float64[np.ndarray, " c"]:
    """Returns 1 gray level of the range of values, or more if float32 cannot express it.

    low, high: The lowest and the highest value of each channel, which are the range if `limits` is
      None.
    """
    low, high = low.astype(np.float64), high.astype(np.float64)
    span = high - low if limits is None else np.full_like(low, limits[1] - limits[0])
    floor = np.maximum(span / 255, 1e-6 * np.maximum(abs(low), abs(high)))
    return np.where(floor > 1e-30, floor, 1.0)  # an image of zeros
