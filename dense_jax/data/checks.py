"""Checks a single image or label for signs of common mistakes in datasets."""

import hashlib

import cv2
import numpy as np
from jaxtyping import Float, Int32, Num, Shaped
from PIL import Image

from dense_jax.labels import IGNORE_LABEL

# Two images look the same if their `difference_hash` values differ in at most this many of 64 bits.
# On CamVid and ISBI 2012, a copy that is saved as JPEG or scaled to a half or a quarter differs in
# at most 5 bits. So do 19 of 20 copies that are brightened by a third or cropped by 2 %. The
# 146,111 pairs of CamVid images in different splits differ in at least 6 bits, consecutive video
# frames in at least 7 bits.
NEAR_BITS = 5

# `looks_interpolated` considers triples of equally spaced pixels whose outer indices differ by at
# least 2. It returns True if the middle index is between them in more than this share of triples.
# In CamVid's 701 labels, the share is at most 0.04, or 0.07 if halved by nearest neighbor. After
# resizing by interpolation or saving as JPEG, the share is at least 0.18.
_MAX_BETWEEN = 0.1
_MIN_TRIPLES = 20  # with fewer such triples, the result is False

DISPLACED = 0.45  # the `displacement`, in pixels, from which on flipped images mislead a network
_REACH = 3  # the largest move that `edge_strengths` tries, in pixels
# `displacement` returns 0 for edges that are weaker. On CamVid, ISBI 2012, magnetic_tile and cwfid,
# their strength is at least 0.8.
_LEAST_STRENGTH = 0.3


def digest(image: Shaped[np.ndarray, "h w c"]) -> bytes:
    """Returns a digest of an image's pixels that does not depend on the file format."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()


def difference_hash(image: Shaped[np.ndarray, "h w c"]) -> np.uint64:
    """Returns a 64-bit perceptual hash. The hashes of images that look the same differ in few bits.

    The image is shrunk to 8 x 9 pixels. Each bit says whether a pixel is brighter than its left
    neighbor.
    """
    gray = Image.fromarray(image.mean(axis=-1, dtype=np.float32))
    cells = np.asarray(gray.resize((9, 8), Image.Resampling.BOX))
    return np.packbits(np.diff(cells, axis=1) > 0).view(np.uint64)[0]


def looks_interpolated(label: Int32[np.ndarray, "h w"]) -> bool:
    """Returns whether a label seems to have been resized by interpolation or saved as JPEG.

    Interpolation creates false classes at borders, such as class 3 between classes 1 and 5. The
    function therefore counts the pixels whose class index lies strictly between the indices of
    their left and right neighbors, or of their upper and lower neighbors, at distance 1 or 2.

    The function misses interpolation if the indices of all adjacent classes differ by 1. It may
    wrongly return True if one class outlines another.
    """
    for distance in (1, 2):  # 2 finds interpolated labels that were later enlarged by nearest
        triples = between = 0
        for values in (label, label.T):
            first, last = values[:, : -2 * distance], values[:, 2 * distance :]
            middle = values[:, distance:-distance]
            triples += np.count_nonzero(abs(last - first) > 1)
            between += np.count_nonzero(np.sign(middle - first) * np.sign(last - middle) > 0)
        if between >= _MIN_TRIPLES and between > _MAX_BETWEEN * triples:
            return True
    return False


def edge_strengths(
    image: Num[np.ndarray, "h w c"], label: Shaped[np.ndarray, "h w"]
) -> Float[np.ndarray, "moves moves"]:
    """Returns how strong the edges of an image are at the edges of its label, for each move of them.

    The moves are -3, ..., 3 pixels down and to the right. The strength is the mean gradient, as a
    multiple of its standard deviation over the image. It is 0 for a label without edges.
    """
    gray = cv2.GaussianBlur(image.mean(axis=-1, dtype=np.float32), (0, 0), 1.0)
    gradient = np.hypot(*(cv2.Sobel(gray, cv2.CV_32F, x, 1 - x) for x in (0, 1)))
    gradient = np.minimum(gradient, np.quantile(gradient, 0.99))  # a few strong edges do not decide
    gradient = (gradient - gradient.mean()) / max(float(gradient.std()), 1e-6)
    edges = np.zeros(label.shape, bool)  # the pixels on both sides of an edge
    for first, second in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        differ = label[first] != label[second]
        differ &= (label[first] != IGNORE_LABEL) & (label[second] != IGNORE_LABEL)
        edges[first] |= differ
        edges[second] |= differ
    edges[:_REACH] = edges[-_REACH:] = edges[:, :_REACH] = edges[:, -_REACH:] = False
    rows, columns = np.nonzero(edges)
    moves = np.arange(-_REACH, _REACH + 1)
    if not rows.size:
        return np.zeros((moves.size, moves.size))
    return np.array(
        [[gradient[rows + down, columns + right].mean() for right in moves] for down in moves]
    )


def displacement(strengths: Float[np.ndarray, "n moves moves"]) -> tuple[float, float]:
    """Returns how far the edges of images lie below and to the right of those of labels, in pixels.

    strengths: The `edge_strengths` of the images.

    Along each axis, the displacement is at the top of the parabola through the strongest move and
    its neighbors. It is 0 if the images have no edges where the labels have them.
    """
    mean = strengths.mean(axis=0)
    down, right = np.unravel_index(mean.argmax(), mean.shape)
    if mean.max() < _LEAST_STRENGTH:
        return 0.0, 0.0
    return _top(mean[:, right]), _top(mean[down])


def _top(profile: Float[np.ndarray, "moves"]) -> float:
    middle = int(np.clip(profile.argmax(), 1, len(profile) - 2))
    before, at, after = profile[middle - 1 : middle + 2].tolist()
    return (after - before) / (2 * (2 * at - before - after)) + middle - _REACH
