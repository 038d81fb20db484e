"""Signs, in one image or one label, of what goes wrong when datasets are made."""

import hashlib

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

# Of the 64 bits of `difference_hash`. Measured on CamVid and ISBI 2012: a copy saved as JPEG or
# scaled to a half or a quarter differs in 5 bits at most, and so do 19 of 20 that were brightened
# by a third or lost 2 % at the borders. No pair of CamVid images in different splits, 146,111 of
# few videos, differs in less than 6; consecutive frames do in 7, and pass.
NEAR_BITS = 5

# Of the triples of pixels that `looks_interpolated` counts. CamVid's 701 labels have up to 0.04, and
# 0.07 halved by nearest neighbor; resized by interpolation, or through JPEG, 0.18 and more.
_MAX_BETWEEN = 0.1
_MIN_TRIPLES = 20  # a few pixels prove nothing


def digest(image: UInt8[np.ndarray, "h w c"]) -> bytes:
    """The same for images of the same pixels, however they are stored."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()


def difference_hash(image: UInt8[np.ndarray, "h w c"]) -> np.uint64:
    """64 bits: is a cell brighter than its left neighbor, on 8 x 9 cells of mean brightness.

    Images that look the same differ in few bits, at whatever size or quality they are stored.
    """
    gray = Image.fromarray(image.mean(axis=-1, dtype=np.float32))
    cells = np.asarray(gray.resize((9, 8), Image.Resampling.BOX))
    return np.packbits(np.diff(cells, axis=1) > 0).view(np.uint64)[0]


def looks_interpolated(label: Int32[np.ndarray, "h w"]) -> bool:
    """Whether borders run through class ids in between, as after bilinear resizing or JPEG.

    Between classes 1 and 5 a resized label has pixels of 3, which nobody has drawn. Of all triples
    of pixels in a row or a column, equally far apart, whose ends are 2 classes or more apart, these
    are the ones whose middle lies between the ends: few in drawn labels, many in interpolated
    ones. Blind where no two classes that touch are 2 apart; fooled by a class that is drawn as a
    line around another.
    """
    for distance in (1, 2):  # 2 finds those that were enlarged by nearest neighbor afterwards
        triples = between = 0
        for values in (label, label.T):
            first, last = values[:, : -2 * distance], values[:, 2 * distance :]
            middle = values[:, distance:-distance]
            triples += np.count_nonzero(abs(last - first) > 1)
            between += np.count_nonzero(np.sign(middle - first) * np.sign(last - middle) > 0)
        if between >= _MIN_TRIPLES and between > _MAX_BETWEEN * triples:
            return True
    return False
