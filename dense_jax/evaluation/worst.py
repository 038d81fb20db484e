"""Finds and draws the images of a split with the lowest mean IoU. Never imports JAX."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from dense_jax import class_colors, drawing, metrics, regions
from dense_jax.data import levels
from dense_jax.spelling import decimal

NUM_DRAWN = 6  # the number of images to draw


class Worst:
    """Keeps the predictions for the images with the lowest mean IoU while a split is evaluated."""

    def __init__(self, source: Any):
        self._source = source
        # (mean IoU, index of the image, predicted classes), from the lowest score on
        self._kept: list[tuple[float, int, UInt8[np.ndarray, "h w"]]] = []

    def add(
        self, i: int, classes: UInt8[np.ndarray, "h w *r"], label: UInt8[np.ndarray, "h w"]
    ) -> None:
        """Adds image i with its maps; see `scoring`. An image without valid pixels is left out."""
        if self._source.regions:
            masks = self._source.regions.masks(label)
            matrices = [_count(classes[..., k], masks[..., k], 2) for k in range(masks.shape[-1])]
            counts = np.stack(matrices)
        else:
            counts = _count(classes, label, self._source.num_classes)
        (score,) = metrics.image_mean_ious(counts[None])
        if not np.isnan(score):
            self._kept.append((float(score), i, regions.flat(classes, self._source.regions)))
            self._kept.sort(key=lambda kept: kept[:2])
            del self._kept[NUM_DRAWN:]

    def draw(self) -> class_colors.Picture | None:
        """Draws the images, from the lowest score on. Returns None if there are none."""
        if not self._kept:
            return None
        predictions = {i: classes for _, i, classes in self._kept}
        return draw(self._source, predictions, {i: score for score, i, _ in self._kept})


def _count(
    classes: UInt8[np.ndarray, "h w"], label: UInt8[np.ndarray, "h w"], n: int
) -> Int64[np.ndarray, "{n} {n}"]:
    pairs = n * label[label < n].astype(np.int64) + classes[label < n]
    return np.bincount(pairs, minlength=n * n).reshape(n, n)


def draw(
    source: Any, predictions: Mapping[int, UInt8[np.ndarray, "_ _"]], scores: Any
) -> class_colors.Picture:
    """Draws images, each with its label, prediction and mean IoU.

    predictions: The prediction for each image to draw, by its index; see `regions.flat`.
    scores: The mean IoU of each image, by its index: an array or a dict.
    """
    colors = class_colors.prediction_colors(source)
    rows = []
    for i, classes in predictions.items():
        example = source[i]
        image = levels.picture(example["image"], value_range=source.value_range)
        label = regions.flat(example["label"], source.regions)
        pictures = drawing.comparison(image, label, classes, class_colors.to_palette(colors))
        rows.append((f"{example['name']}: mean IoU {decimal(float(scores[i]))}", pictures))
    return drawing.contact_sheet(rows, colors | class_colors.MARKS)
