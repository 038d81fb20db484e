"""Class weights against imbalance: `loss_options.class_weights` by name.

Those of METHODS are computed from the labels of the training split, those of PUBLISHED are a
paper's, for its dataset alone.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from dense_jax import storage
from dense_jax.data import Source, verify

Counts = Int64[np.ndarray, "n c"]  # pixels of each class in each image
Weights = Float64[np.ndarray, " c"]


def median_frequency(counts: Counts) -> Weights:
    """median(f) / f, with f the class's pixels over the valid pixels of the images that show it.

    Eigen and Fergus 2015 (arXiv 1411.4734), as in SegNet; the median is over the
    classes seen. 0 for a class without a pixel.
    """
    shown_in = counts.sum(axis=1) @ (counts > 0)  # [c], pixels
    return _relative(counts.sum(axis=0), shown_in, np.median)


def inverse_frequency(counts: Counts) -> Weights:
    """n / (k n_c): all n valid pixels over the class's own, times the number k of classes seen.

    Every class then weighs the same in the sum over all pixels. 0 for a class without a pixel.
    """
    return _relative(
        counts.sum(axis=0), np.full(counts.shape[1], counts.sum()), lambda f: 1 / f.size
    )


METHODS: dict[str, Callable[[Counts], Weights]] = {
    "median_frequency": median_frequency,
    "inverse_frequency": inverse_frequency,
}
PUBLISHED: dict[str, tuple[float, ...]] = {
    # SegNet's, for the 11 classes of CamVid (its tutorial's prototxt). They are median frequencies,
    # but not of the labels as released: there sign symbols get 3.8, not 9.6.
    "segnet_camvid": (
        *(0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826),
        *(9.6446, 1.8418, 0.6823, 6.2478, 7.3614),
    ),
}


def class_weights(name: str, source: Source) -> tuple[float, ...]:
    """One weight per class of the source, by a name in METHODS or PUBLISHED.

    Raises ValueError if a published set is for another number of classes.
    """
    if name in METHODS:
        return tuple(METHODS[name](class_counts(source)).tolist())
    weights = PUBLISHED[name]
    if len(weights) != source.num_classes:
        raise ValueError(
            f"loss_options.class_weights={name!r} are {len(weights)} weights, but the dataset has "
            f"{source.num_classes} classes: {', '.join(source.class_names)}"
        )
    return weights


def class_counts(source: Source) -> Counts:
    """Pixels of each class in each image; kept in the user's cache folder, by fingerprint.

    Raises ValueError, listing them, if examples are bad.
    """
    if source.fingerprint is None:
        return _count(source)
    cache = storage.cache_folder() / "class_counts" / f"{source.fingerprint}.npy"
    with contextlib.suppress(OSError, ValueError):
        return np.load(cache)
    counts = _count(source)
    # Where the cache cannot be written, pixels are counted again next time.
    with contextlib.suppress(OSError), storage.atomic(cache) as file:
        np.save(file, counts)
    return counts


def _count(source: Source) -> Counts:
    def of_example(example: dict[str, Any]) -> np.ndarray:
        return np.bincount(example["label"].ravel(), minlength=256)[: source.num_classes]

    counts, errors = verify.scan(source, of_example)
    verify.refuse(errors, len(source))
    return np.stack(counts).astype(np.int64)


def _relative(
    pixels: np.ndarray, out_of: np.ndarray, reference: Callable[[np.ndarray], float]
) -> Weights:
    """reference(f) / f for f = pixels / out_of where there are pixels, else 0.

    Raises ValueError if there are none.
    """
    seen = pixels > 0
    if not seen.any():
        raise ValueError("class weights need labels, and no pixel of the split has any")
    frequency = pixels[seen] / out_of[seen]
    weights = np.zeros(len(pixels))
    weights[seen] = reference(frequency) / frequency
    return weights
