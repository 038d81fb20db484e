"""Checks a single image or label for signs of common mistakes in datasets."""

import hashlib

import numpy as np
from jaxtyping import Int32, Shaped
from PIL import Image

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
