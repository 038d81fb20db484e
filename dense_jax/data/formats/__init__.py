"""Reads what annotation tools export. FORMATS[name] reads one format and returns an `Export`.

The parameters of a reader are the flags of `data.convert` that the format takes. A new format is
one file here and one line of FORMATS.
"""

from collections.abc import Callable

from dense_jax.data.formats import coco, labelme, masks
from dense_jax.data.formats.export import Export

FORMATS: dict[str, Callable[..., Export]] = {
    "coco": coco.read,
    "labelme": labelme.read,
    "colors": masks.read_colors,
    "masks": masks.read,
}
