"""Makes the result files of one image from the strips that a predictor yields.

The kinds of results are "classes", "overlay", "probabilities", "uncertainty" and "objects", and
those of an ensemble also "expected_entropy" and "mutual_information". With regions, there is a mask
for each instead of "classes", whose kind is "mask REGION".
"""

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dense_jax import class_colors, drawing, regions
from dense_jax.inference import image_files, object_maps, writers
from dense_jax.inference.predictor import MakeMap, Predictor, entropy, mutual_information
from dense_jax.inference.stitching import Failure, Strip
from dense_jax.regions import Regions

# The maps that are computed from probabilities [n, m, num_classes].
MAPS: dict[str, MakeMap] = {
    "probabilities": lambda block, _: block.astype(np.float16),
    "uncertainty": lambda block, _: entropy(block),
    "expected_entropy": entropy,
    "mutual_information": mutual_information,
    "confidence": lambda block, _: block.max(axis=-1).astype(np.float16),
}
MASK = "mask "  # the kind of a region's mask begins with it
MASK_COLORS = np.array([(0, 0, 0), (255, 255, 255)], np.uint8)
# The name of each result file ends with one of these, by kind. That of probabilities varies.
ENDINGS = {
    "classes": ".png",
    "overlay": "_overlay.png",
    "uncertainty": "_uncertainty.png",
    "expected_entropy": "_expected_entropy.png",
    "mutual_information": "_mutual_information.png",
    "objects": "_objects.png",
}


class Wanted(NamedTuple):
    """The options for the results of each image."""

    endings: Mapping[str, str]  # how the names of the files end, by kind
    opacity: float  # of the overlay's colors
    outlines: bool
    object_kinds: object_maps.Kinds


def endings(kinds: Iterable[str], regions: Regions | None) -> dict[str, str]:
    """Returns how the names of the files of the given kinds end, by kind."""
    found = {kind: ENDINGS[kind] for kind in kinds}
    if regions:
        del found["classes"]
        safe = {name: re.sub(r"[^\w.-]", "_", name) for name in regions.names}
        found = {MASK + name: f"_{safe[name]}.png" for name in regions.names} | found
    return found


def maps(wanted: Wanted, regions: Regions | None) -> dict[str, MakeMap]:
    """Returns the maps that the results need besides "image" and "classes"."""
    needed = {*wanted.endings, *(["confidence"] if "objects" in wanted.endings else [])}
    offered = MAPS
    if regions:
        offered = MAPS | {
            "uncertainty": lambda block, _: entropy(block, of_regions=True),
            "expected_entropy": functools.partial(entropy, of_regions=True),
            "mutual_information": functools.partial(mutual_information, of_regions=True),
            # Objects are those of a single region.
            "confidence": lambda p, _: np.where(regions.inside(p), p, 1 - p)[..., 0].astype(
                np.float16
            ),
        }
    return {name: make for name, make in offered.items() if name in needed}


def paths(image: image_files.Image, output: Path, endings: Mapping[str, str]) -> dict[str, Path]:
    """Returns the result files of an image by kind. The class map of a GeoTIFF file is one, too."""

    def path(kind: str, ending: str) -> Path:
        is_geotiff = image.is_geotiff and (kind == "classes" or kind.startswith(MASK))
        return output / (image.name + (f"{ending[:-4]}.tif" if is_geotiff else ending))

    return {kind: path(kind, ending) for kind, ending in endings.items()}


class ImageResults:
    """Makes the results of one image, whose strips are added from top to bottom.

    files: The result files by kind.
    classes: The classes in the strips added so far, or with regions what `regions.flat` has.
    """

    def __init__(
        self, image: image_files.Image, output: Path, predictor: Predictor, wanted: Wanted
    ):
        self._regions, self._wanted = predictor.regions, wanted
        self._palette = class_colors.to_palette(class_colors.prediction_colors(predictor))
        self.classes = set[int]()
        self.objects = object_maps.ObjectsOfImage(image.size[0], wanted.object_kinds)
        self.files: dict[str, writers.Rows] = {}
        for kind, path in paths(image, output, wanted.endings).items():
            if kind == "probabilities":
                shape = *image.size, len(predictor.output_names)
                self.files[kind] = writers.Array(path, shape, image.geo_tags)
            elif path.suffix == ".tif":
                palette = MASK_COLORS if predictor.regions else predictor.palette
                self.files[kind] = writers.GeoTiff(path, image.size, palette, image.geo_tags)
            else:
                self.files[kind] = writers.Png(
                    path,
                    image.size,
                    rgb=kind == "overlay",
                    bits=16 if kind == "objects" else 8,
                    palette=predictor.palette if kind == "classes" else None,
                )

    def prepared(self, strips: Iterable[Strip | Failure]) -> Iterator[Strip | Failure]:
        """Yields the strips, with the maps "flat" and, if overlays show outlines, "outlines".

        Outlines depend on the rows above and below, so each strip waits for the one below it.
        """
        strips = map(self._with_flat, strips)
        if not self._wanted.outlines:
            yield from strips
            return
        above: list[np.ndarray] = []
        held: Strip | None = None
        for strip in itertools.chain(strips, [None]):
            if held is not None:
                classes = held.maps["flat"]
                below = [strip.maps["flat"][:1]] if isinstance(strip, Strip) else []
                outlines = drawing.outlines(np.concatenate([*above, classes, *below]))
                held.maps["outlines"] = outlines[len(above) :][: len(classes)]
                yield held
                above = [classes[-1:]]
            held = strip if isinstance(strip, Strip) else None
            if isinstance(strip, Failure):
                yield strip

    def _with_flat(self, strip: Strip | Failure) -> Strip | Failure:
        if isinstance(strip, Strip):
            strip.maps["flat"] = regions.flat(strip.maps["classes"], self._regions)
        return strip

    def rows(self, kind: str, strip: Strip) -> Iterator[np.ndarray]:
        """Yields the rows that a strip adds to the result file of a given kind."""
        if kind == "overlay":
            yield from self._overlay(strip)
        elif kind == "objects":
            maps = strip.maps | {"classes": strip.maps["flat"]}
            yield from self.objects.add(strip._replace(maps=maps))
        elif self._regions and kind.startswith(MASK):
            mask = strip.maps["classes"][..., self._regions.names.index(kind.removeprefix(MASK))]
            yield mask if self.files[kind].path.suffix == ".tif" else 255 * mask
        else:
            yield strip.maps[kind]

    def _overlay(self, strip: Strip) -> Iterator[np.ndarray]:
        image, classes = strip.maps["image"], strip.maps.get("outlines", strip.maps["flat"])
        self.classes.update(np.flatnonzero(np.bincount(strip.maps["flat"].ravel())).tolist())
        num_rows = max(1, 2**20 // image.shape[1])  # blending takes 8 bytes per color value
        for y in range(0, len(image), num_rows):
            part = slice(y, y + num_rows)
            yield drawing.overlay(image[part], classes[part], self._palette, self._wanted.opacity)
