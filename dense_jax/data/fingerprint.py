"""Measures the properties of a training split from which `dense_jax.plan` chooses options.

The name follows nnU-Net (Isensee et al. 2021), whose rules also start from a dataset fingerprint.
"""

from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

from dense_jax.data import checks, verify
from dense_jax.data.source import Source
from dense_jax.data.subset import Subset
from dense_jax.labels import IGNORE_LABEL

NUM_READ = 100  # the number of images to read, evenly spaced
LEAST_OBJECT = 16  # pixels of the smallest object
RESOLUTIONS = (1.0, 0.75, 0.5, 0.375, 0.25)  # the resolutions at which labels are measured


class Fingerprint(NamedTuple):
    """The properties of a training split. Those of pixels and labels come from NUM_READ images.

    sizes: The height and width of all images, in pixels.
    shares: The share of each class in the valid pixels.
    num_objects: The number of connected regions of one class in all images, estimated from those
      that were read. Regions smaller than LEAST_OBJECT pixels do not count.
    exposure_spread: How much the brightness differs between images: the standard deviation of the
      images' means, divided by the mean of the images' standard deviations. The largest over
      channels.
    displacement: How far the edges of images lie below and to the right of those of their labels, in
      pixels (see `checks.displacement`).
    upright: How much the classes in the upper half of the images differ from those in the lower
      half: the total variation distance of their shares, from 0 (equal) to 1.
    confusions: The confusion matrix of labels that are reduced to each of RESOLUTIONS and enlarged
      again. It bounds the scores of a network that works at this resolution.
    """

    sizes: Int64[np.ndarray, "n 2"]
    shares: Float64[np.ndarray, "c"]
    num_objects: int
    exposure_spread: float
    displacement: tuple[float, float]
    upright: float
    confusions: Int64[np.ndarray, "resolutions c c"]


class _Facts(NamedTuple):
    """The properties of one image."""

    halves: Int64[np.ndarray, "2 c"]  # the number of pixels of each class above and below
    num_objects: Int64[np.ndarray, ""]
    mean: Float64[np.ndarray, "channels"]
    deviation: Float64[np.ndarray, "channels"]
    edge_strengths: Float64[np.ndarray, "moves moves"]
    confusions: Int64[np.ndarray, "resolutions c c"]


def measure(source: Source) -> Fingerprint:
    """Returns the fingerprint of a split. Raises ValueError if an image that is read is invalid."""
    n = len(source)
    rows = np.unique(np.linspace(0, n - 1, min(n, NUM_READ)).round().astype(int))
    found = verify.scan(Subset(source, rows), lambda example: _facts(example, source.num_classes))
    facts = _Facts(*map(np.array, zip(*found, strict=True)))  # each field now has all images
    pixels = facts.halves.sum(axis=1)
    total = pixels.sum(axis=0)
    if not total.any():
        raise ValueError(f"every pixel of the {len(rows)} labels that were read is ignored")
    spread = facts.mean.std(axis=0) / np.maximum(facts.deviation.mean(axis=0), 1e-6)
    above, below = (half / max(1, half.sum()) for half in facts.halves.sum(axis=0))
    return Fingerprint(
        sizes=np.asarray(source.sizes, np.int64),
        shares=total / total.sum(),
        num_objects=round(facts.num_objects.mean() * n),
        exposure_spread=float(spread.max()),
        displacement=checks.displacement(facts.edge_strengths),
        upright=float(abs(above - below).sum() / 2),
        confusions=facts.confusions.sum(axis=0),
    )


def _facts(example: dict[str, Any], num_classes: int) -> _Facts:
    image, label = example["image"], example["label"].astype(np.uint8)
    middle = label.shape[0] // 2
    halves = [np.bincount(x.ravel(), minlength=256) for x in (label[:middle], label[middle:])]
    return _Facts(
        halves=np.array(halves)[:, :num_classes],
        num_objects=np.array(sum(_num_objects(label == c) for c in range(num_classes))),
        mean=image.mean(axis=(0, 1), dtype=np.float64),
        deviation=image.std(axis=(0, 1), dtype=np.float64),
        edge_strengths=checks.edge_strengths(image, label),
        confusions=np.array(
            [_confusion(label, reduced(label, r), num_classes) for r in RESOLUTIONS]
        ),
    )


def _num_objects(mask: Bool[np.ndarray, "h w"]) -> int:
    _, _, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return int(np.sum(statistics[1:, cv2.CC_STAT_AREA] >= LEAST_OBJECT))  # row 0 is the background


def _confusion(
    label: UInt8[np.ndarray, "h w"], prediction: UInt8[np.ndarray, "h w"], num_classes: int
) -> Int64[np.ndarray, "c c"]:
    valid = label != IGNORE_LABEL
    pairs = label[valid].astype(np.int64) * num_classes + prediction[valid]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def reduced(label: UInt8[np.ndarray, "h w"], resolution: float) -> UInt8[np.ndarray, "h w"]:
    """Returns a label that is reduced to a resolution and enlarged to its size again.

    The mask of each class is averaged over the area of the reduced pixels and then interpolated
    bilinearly. Each pixel gets the class with the highest value.
    """
    height, width = label.shape
    size = max(1, round(resolution * width)), max(1, round(resolution * height))
    best = np.zeros(label.shape, np.float32)
    result = np.zeros_like(label)
    for c in np.unique(label[label != IGNORE_LABEL]):
        mask = (label == c).astype(np.float32)
        small = cv2.resize(mask, size, interpolation=cv2.INTER_AREA)
        value = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
        higher = value > best
        best[higher], result[higher] = value[higher], c
    return result
