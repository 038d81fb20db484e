"""Signs of mistakes that are often made with datasets, in one image or one label."""

import hashlib

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

# Images that differ in no more bits of `difference_hash` look the same. Measured on CamVid and ISBI
# 2012: a copy that is saved as JPEG or scaled to a half or a quarter differs in at most 5 of 64 bits,
# and so do 19 of 20 copies that are brightened by a third or cropped by 2 %. The 146,111 pairs of
# CamVid images in different splits differ in at least 6 bits, consecutive frames of a video in 7.
NEAR_BITS = 5

# The share of triples of pixels that `looks_interpolated` allows. CamVid's 701 labels have up to
# 0.04, and 0.07 if halved by nearest neighbor; resized by interpolation or saved as JPEG, they have
# 0.18 or more.
_MAX_BETWEEN = 0.1
_MIN_TRIPLES = 20  # a few pixels prove nothing


def digest(image: UInt8[np.ndarray, "h w c"]) -> bytes:
    """Returns a digest of an image's pixels, whatever format they are stored in."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()


def difference_hash(image: UInt8[np.ndarray, "h w c"]) -> np.uint64:
    """Returns 64 bits: whether a cell is brighter than its left neighbor, for 8 x 9 cells.

    Images that look the same differ in few bits, whatever their size or quality.
    """
    gray = Image.fromarray(image.mean(axis=-1, dtype=np.float32))
    cells = np.asarray(gray.resize((9, 8), Image.Resampling.BOX))
    return np.packbits(np.diff(cells, axis=1) > 0).view(np.uint64)[0]


def looks_interpolated(label: Int32[np.ndarray, "h w"]) -> bool:
    """Returns whether a label seems to be resized by interpolation or saved as JPEG.

    Between classes 1 and 5, such a label has pixels of class 3, which nobody has drawn. Looks at
    triples of equally spaced pixels, in rows and columns, whose ends are at least 2 classes apart.
    The middle lies between the ends in few triples of a drawn label and in many of an interpolated
    one. Notices nothing if no two classes that touch are 2 apart, and mistakes a class that is
    drawn as a line around another class.
    """
    for distance in (1, 2):  # 2 finds labels that were enlarged by nearest neighbor afterwards
        triples = between = 0
        for values in (label, label.T):
            first, last = values[:, : -2 * distance], values[:, 2 * distance :]
            middle = values[:, distance:-distance]
            triples += np.count_nonzero(abs(last - first) > 1)
            between += np.count_nonzero(np.sign(middle - first) * np.sign(last - middle) > 0)
        if between >= _MIN_TRIPLES and between > _MAX_BETWEEN * triples:
            return True
    return False
