"""Computes class weights and repeat factors, which counter class imbalance.

METHODS holds functions that compute class weights from the labels of the training split. PUBLISHED
holds weights that were published for specific datasets.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from dense_jax.data import verify
from dense_jax.data.source import Source

Counts = Int64[np.ndarray, "n c"]  # number of pixels of each class in each image
Weights = Float64[np.ndarray, " c"]


def median_frequency(counts: Counts) -> Weights:
    """Returns median-frequency class weights, median(f) / f, where f is the frequency of a class.

    The frequency of a class is its share of the valid pixels in the images that contain the class
    (Eigen and Fergus 2015, arXiv 1411.4734; SegNet). The median is over the classes that occur. A
    class that does not occur gets weight 0.
    """
    shown_in = counts.sum(axis=1) @ (counts > 0)  # [c], valid pixels in the images with the class
    return _relative(counts.sum(axis=0), shown_in, np.median)


def inverse_frequency(counts: Counts) -> Weights:
    """Returns inverse-frequency class weights, which give all classes the same total weight.

    The weight of class c is n / (k n_c), where n is the number of valid pixels, n_c the number of
    pixels of class c, and k the number of classes that occur. Absent classes get weight 0.
    """
    num_valid = np.full(counts.shape[1], counts.sum())
    return _relative(counts.sum(axis=0), num_valid, lambda f: 1 / f.size)


METHODS: dict[str, Callable[[Counts], Weights]] = {
    "median_frequency": median_frequency,
    "inverse_frequency": inverse_frequency,
}
PUBLISHED: dict[str, tuple[float, ...]] = {
    # SegNet's weights for the 11 classes of CamVid, from the prototxt of the SegNet tutorial. They
    # equal the median-frequency weights of the released labels except for sign_symbol
    # (9.6 instead of 3.8).
    "segnet_camvid": (
        *(0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826),
        *(9.6446, 1.8418, 0.6823, 6.2478, 7.3614),
    ),
}


def class_weights(name: str, source: Source) -> tuple[float, ...]:
    """Returns one weight for each class of a source. `name` is a key of METHODS or PUBLISHED.

    Raises ValueError if published weights are for a different number of classes, and for regions.
    """
    if source.regions:
        raise ValueError(
            f"loss_options.class_weights={name!r} is for classes, but the dataset declares regions: "
            f"pass a number for each of {', '.join(source.regions.names)}, or none"
        )
    if name in METHODS:
        return tuple(METHODS[name](class_counts(source)).tolist())
    weights = PUBLISHED[name]
    if len(weights) != source.num_classes:
        raise ValueError(
            f"loss_options.class_weights={name!r} are {len(weights)} weights, but the dataset has "
            f"{source.num_classes} classes: {', '.join(source.class_names)}"
        )
    return weights


def repeat_factors(counts: Counts, threshold: float) -> Float64[np.ndarray, " n"]:
    """Returns how often each image is drawn, relative to images of common classes only.

    With f_c the fraction of images that show class c, this is the largest max(1, sqrt(threshold /
    f_c)) of the image's classes (Gupta et al. 2019, arXiv 1908.03195, appendix B.2).
    """
    is_shown = counts > 0
    factors = np.sqrt(threshold / np.maximum(is_shown.mean(axis=0), 1 / len(counts)))
    return np.where(is_shown, factors, 1).max(axis=1).clip(1)


def class_counts(source: Source) -> Counts:
    """Returns the number of pixels of each class in each image, [n, c].

    Raises ValueError if an example is invalid.
    """

    def count(example: dict[str, Any]) -> np.ndarray:
        return np.bincount(example["label"].ravel(), minlength=256)[: source.num_classes]

    return verify.cached(source, "class_counts", lambda: np.stack(verify.scan(source, count)))


def _relative(
    pixels: np.ndarray, total: np.ndarray, reference: Callable[[np.ndarray], float]
) -> Weights:
    """Returns the class weights reference(f) / f, where f = pixels / total are class frequencies.

    `reference` gets only the frequencies of classes with pixels. Other classes get weight 0. Raises
    ValueError if no class has pixels.
    """
    seen = pixels > 0
    if not seen.any():
        raise ValueError("class weights need labels, and no pixel of the split has any")
    frequency = pixels[seen] / total[seen]
    weights = np.zeros(len(pixels))
    weights[seen] = reference(frequency) / frequency
    return weights
