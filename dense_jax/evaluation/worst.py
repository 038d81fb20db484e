"""Finds and draws the images of a split with the lowest mean IoU. Never imports JAX."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dense_jax import class_colors, drawing, metrics
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
        self, i: int, classes: UInt8[np.ndarray, "h w"], label: UInt8[np.ndarray, "h w"]
    ) -> None:
        """Adds image i with its class maps. An image without valid pixels is left out."""
        n = self._source.num_classes
        pairs = n * label[label < n].astype(np.int64) + classes[label < n]
        (score,) = metrics.image_mean_ious(np.bincount(pairs, minlength=n * n).reshape(1, n, n))
        if not np.isnan(score):
            self._kept.append((float(score), i, classes))
            self._kept.sort(key=lambda kept: kept[:2])
            del self._kept[NUM_DRAWN:]

    def draw(self) -> class_colors.Picture | None:
        """Draws the images, from the lowest score on. Returns None if there are none."""
        if not self._kept:
            return None
        predictions = {i: classes for _, i, classes in self._kept}
        return draw(self._source, predictions, {i: score for score, i, _ in self._kept})


def draw(
    source: Any, predictions: Mapping[int, UInt8[np.ndarray, "_ _"]], scores: Any
) -> class_colors.Picture:
    """Draws images, each with its label, prediction and mean IoU.

    predictions: The predicted class map of each image to draw, by its index.
    scores: The mean IoU of each image, by its index: an array or a dict.
    """
    palette = class_colors.palette_of(source)
    rows = []
    for i, classes in predictions.items():
        example = source[i]
        image = levels.picture(example["image"], value_range=source.value_range)
        pictures = drawing.comparison(image, example["label"], classes, palette)
        rows.append((f"{example['name']}: mean IoU {decimal(float(scores[i]))}", pictures))
    return drawing.contact_sheet(
        rows, class_colors.colors_of(source.class_names, palette) | class_colors.MARKS
    )
