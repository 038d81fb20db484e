"""COCO JSON: polygons and run lengths (instances, stuff), and panoptic PNG files.

CVAT, Label Studio and many others export it. Masks are those of pycocotools. The layers of an image
are its annotations in the order of the file, with the crowds below them. See
https://cocodataset.org/#format-data.
"""

import collections
import contextlib
import functools
import io
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dense_jax.data import files
from dense_jax.data.formats import export
from dense_jax.data.formats.export import IGNORED, Export, Item, Layer, Shape

_ORDER = "the later annotation in the file lies on top"

Segment = dict[str, Any]  # an annotation, or an entry of a panoptic annotation's segments_info


def read(annotations: str, images: str, masks: str | None = None, crowd: str = "ignored") -> Export:
    """Reads one JSON file, or one for each SPLIT.

    images: The folder that each `file_name` is relative to. masks: The folder of panoptic files.
    crowd: "ignored", or "objects", because CVAT exports each mask made with a brush as a crowd.

    Raises ValueError if the annotations lack masks, or if the splits differ in their categories.
    """
    items: list[Item] = []
    names: dict[int, str] = {}
    num_crowds = num_segments = 0
    for holes, path in export.find(annotations):
        table = files.read_json(path, "")
        try:
            categories = {c["id"]: c["name"] for c in table["categories"]}
            pictures = {p["id"]: p["file_name"].replace("\\", "/") for p in table["images"]}
            segments, pngs = _segments(path, table, masks is not None)
            for segment in (s for of_image in segments.values() for s in of_image):
                is_crowd = bool(segment.get("iscrowd"))
                num_crowds, num_segments = num_crowds + is_crowd, num_segments + 1
                is_ignored = is_crowd and crowd == "ignored"
                segment["class"] = IGNORED if is_ignored else categories[segment["category_id"]]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not as COCO's format has it: {error!r}") from error
        if names and categories != names:
            raise ValueError(f"{path}: its categories are not those of the other splits")
        names = categories
        coco = None if masks else _index(table)
        things = {c["id"] for c in table["categories"] if c.get("isthing", 1)}
        folder = pathlib.Path(export.fill(images, holes))
        for number, name in zip(pictures, names_of(list(pictures.values())), strict=True):
            image = folder / pictures[number]
            if not image.is_file():  # Label Studio may give the path on its server
                image = folder / image.name
            if masks and number not in pngs:
                raise ValueError(f"{path}: image {pictures[number]} has no annotation")
            sources: tuple[pathlib.Path, ...] = ()
            layers = functools.partial(_instances, coco, segments[number])
            if masks:
                sources = (pathlib.Path(export.fill(masks, holes)) / pngs[number],)
                layers = functools.partial(_panoptic, *sources, segments[number], things)
            text = repr([sorted(segment.items()) for segment in segments[number]])
            items.append(Item(holes.get("SPLIT"), name, image, layers, sources, text))
    note = f"{num_crowds} of {num_segments} annotations are crowds: " + (
        "objects like others"
        if crowd == "objects"
        else "their pixels are ignored where no object lies on them"
        + " (--crowd=objects if a brush in CVAT made them)" * (num_crowds > 0)
    )
    found = Export(items, export.with_background(names.values()), _ORDER, note=note)
    if masks:  # pixels of no segment are unlabeled
        found = found._replace(class_names=list(names.values()), rest=IGNORED)
    return found


def _segments(
    path: pathlib.Path, table: Any, is_panoptic: bool
) -> tuple[dict[int, list[Segment]], dict[int, str]]:
    """Returns the segments and, if panoptic, the PNG file of each image, by the image's id."""
    segments: dict[int, list[Segment]] = collections.defaultdict(list)
    pngs: dict[int, str] = {}
    for annotation in table["annotations"]:
        if is_panoptic != ("segments_info" in annotation):
            raise ValueError(
                f"{path}: --masks is the folder of panoptic PNG files, which the annotations "
                + ("do not have" if is_panoptic else "have: give it")
            )
        if is_panoptic:
            pngs[annotation["image_id"]] = annotation["file_name"]
        elif not annotation.get("segmentation"):
            raise ValueError(
                f"{path}: annotation {annotation.get('id')} is a box without a mask; export "
                "polygons or masks"
            )
        segments[annotation["image_id"]] += annotation.get("segments_info", [annotation])
    return segments, pngs


def _index(table: Any) -> Any:
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise ValueError("COCO's masks need a package: pip install pycocotools") from error
    coco = COCO()
    coco.dataset = table
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def names_of(paths: Sequence[str]) -> list[str]:
    """Returns a NAME for each image: its file's, with those of the folders if two are alike."""
    bare = [str(pathlib.PurePosixPath(path).with_suffix("")).strip("/") for path in paths]
    names = [path.rpartition("/")[2] for path in bare]
    return names if len(set(names)) == len(names) else [path.replace("/", "_") for path in bare]


def _instances(coco: Any, segments: list[Segment], shape: Shape) -> Iterator[Layer]:
    for i, segment in enumerate(sorted(segments, key=lambda s: s["class"] != IGNORED)):
        yield Layer(coco.annToMask(segment).astype(bool), segment["class"], i)


def _panoptic(
    path: pathlib.Path, segments: list[Segment], things: set[int], shape: Shape
) -> Iterator[Layer]:
    ids = export.read_rgb(path) @ np.array([1, 256, 65536])
    if unknown := set(np.unique(ids)) - {0} - {segment["id"] for segment in segments}:
        raise ValueError(f"has segments {sorted(map(int, unknown))}, which the JSON file lacks")
    for segment in segments:
        is_thing = segment["category_id"] in things
        yield Layer(ids == segment["id"], segment["class"], segment["id"] if is_thing else None)
