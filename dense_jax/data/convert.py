"""Converts what annotation tools export to a folder of images and labels, as `data.folder` has it.

    python -m dense_jax.data.convert --from=coco --annotations=result.json --images=EXPORT \\
        --output=ROOT
    python -m dense_jax.data.convert --from=labelme --annotations=FOLDER --output=ROOT
    python -m dense_jax.data.convert --from=colors --images=FOLDER --masks=FOLDER \\
        --colors=labelmap.txt --output=ROOT
    python -m dense_jax.data.convert --from=masks --images=FOLDER --masks='FOLDER/NAME_mask.png' \\
        --output=ROOT

Paths may be patterns: 'annotations/instances_SPLIT2017.json', 'masks/CLASS/NAME.png',
'NAME/masks/*.png' (each file an object). Without SPLIT in them, --lists gives the splits, and without
lists, a hash of each image's NAME does: 70 % train, 15 % val and 15 % test. --group keeps images of
the same patient, video or place in one split.

Objects become instance files. Where objects overlap, the later one lies on top. Ignored pixels have
the value 255 in the labels: crowds of COCO, where no object lies on them, unlabeled pixels of
panoptic files, and what a tool's user calls __ignore__. What was done is printed, and written to
ROOT/conversion.json. The exported files are only read. If the command is interrupted, run it again:
complete images are kept, and images whose annotation has changed are converted again.
"""

import hashlib
import inspect
import io
import json
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import tqdm
from absl import flags
from jaxtyping import UInt8, UInt16
from PIL import Image, PngImagePlugin

from dense_jax import command, storage
from dense_jax.data import decode, files, folder
from dense_jax.data.formats import FORMATS
from dense_jax.data.formats.export import BACKGROUND, IGNORED, Export, Item, Layer, Shape
from dense_jax.labels import IGNORE_LABEL
from dense_jax.spelling import some

HASHED = {"train": 0.7, "val": 0.85, "test": 1.0}  # the hashes below which groups are in a split
SOURCES = ("annotations", "images", "masks", "colors", "crowd")  # flags that formats take
KINDS = ("images", "instances", "labels", "splits")
_CHUNK = "conversion"  # of a label's PNG file: from what it was made, and how


class _Files(NamedTuple):
    """The files that an image is converted to. The label is written last."""

    image: pathlib.Path
    instances: pathlib.Path | None
    label: pathlib.Path


def convert(
    export: Export, output: str, lists: str | None = None, group: str | None = None
) -> dict[str, Any]:
    """Writes the images of an export to the folder `output`. Returns what was done, for people.

    lists: A folder of SPLIT.txt, each with the NAMEs of a split.
    group: A regular expression, whose first group (or match) in a NAME is kept in one split.

    Raises ValueError if the export has a mistake, or if `output` holds files of something else.
    """
    root = pathlib.Path(output).resolve()
    splits, rule = assign(export.items, lists, group)
    pairs = [
        (item, _files(root, split, item, export.has_objects))
        for split, items in splits.items()
        for item in items
    ]
    _claim(root, export, pairs)
    counts: Counter[str] = Counter()
    with futures.ThreadPoolExecutor() as pool:
        done = pool.map(lambda pair: _convert(export, *pair), pairs)
        for of_image in tqdm.tqdm(done, total=len(pairs), disable=None):
            counts.update(of_image)
    images = ", ".join(f"{len(items)} {split}" for split, items in splits.items())
    classes = ", ".join(f"{i} {name}" for i, name in enumerate(export.class_names))
    report = {
        "images": f"{images}; {counts['kept']} were complete before, {counts['again']} are made again",
        "splits": rule,
        "classes": f"{classes}; {IGNORE_LABEL} is ignored",
        "empty": f"{counts['empty']} images hold nothing but {export.rest}",
    }
    if export.order:
        report["overlaps"] = (
            f"{counts['overlap']} pixels of {counts['overlapping']} images are in more than one "
            f"mask; {export.order}"
        )
    if export.note:
        report["note"] = export.note
    storage.write_json(root / "conversion.json", report)
    return report


def assign(
    items: list[Item], lists: str | None = None, group: str | None = None
) -> tuple[dict[str, list[Item]], str]:
    """Returns the images of each split, and in words how the splits were made; see `convert`.

    Raises ValueError if two images have the same name, or if a split would be empty.
    """
    splits: dict[str, list[Item]] = defaultdict(list)
    by_path = items[0].split is not None
    if sum(map(bool, (by_path, lists, group))) > 1:
        raise ValueError("the splits are given by one of SPLIT in the paths, --lists and --group")
    if by_path:
        names, rule = {}, "as SPLIT in the paths has it"
    elif lists:
        names = _read_lists(pathlib.Path(lists), {item.name for item in items})
        left_out = sum(item.name not in names for item in items)
        rule = f"as the lists in {lists} have it; {left_out} images are in no list and left out"
    else:
        names = {item.name: _hashed(item.name, group) for item in items}
        hashed = f"what {group} matches in NAME" if group else "NAME"
        rule = f"by a hash of {hashed}: 70 % train, 15 % val, 15 % test"
        if empty := HASHED.keys() - set(names.values()):
            raise ValueError(
                f"too few images for splits by a hash: {', '.join(sorted(empty))} would be empty; "
                "write train.txt, val.txt and test.txt, a NAME on each line, and pass --lists=FOLDER"
            )
    for item in items:
        if split := item.split or names.get(item.name):
            splits[split].append(item)
    for split, chosen in splits.items():
        if repeated := [n for n, k in Counter(item.name for item in chosen).items() if k > 1]:
            raise ValueError(f"several images of {split} have one NAME: {some(repeated)}")
    return splits, rule


def _read_lists(folder_of_lists: pathlib.Path, names: set[str]) -> dict[str, str]:
    """Returns {NAME: split}. Raises ValueError for a name that no image or another list has."""
    paths = sorted(folder_of_lists.glob("[!.]*.txt"))
    if not paths:
        raise ValueError(f"{folder_of_lists}: no lists SPLIT.txt")
    folder.check_disjoint(paths)
    listed = {name: path.stem for path in paths for name in files.read_list(path)}
    if unknown := [name for name in listed if name not in names]:
        raise ValueError(
            f"{folder_of_lists}: lists {some(unknown)}, but the images are {some(sorted(names))}"
        )
    return listed


def _hashed(name: str, group: str | None) -> str:
    """Returns the split of a group, which is a function of the group alone."""
    match = re.search(group or ".*", name)
    if not match:
        raise ValueError(f"--group={group} matches nothing in {name!r}")
    key = match[1 if match.re.groups else 0] or ""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    return next(split for split, end in HASHED.items() if number < end)


def _files(root: pathlib.Path, split: str, item: Item, has_objects: bool) -> _Files:
    ending = item.image.suffix
    if ending.lower() not in files.IMAGE_ENDINGS:
        raise ValueError(
            f"{item.image}: images are {', '.join(files.IMAGE_ENDINGS)}; save it as one of these"
        )
    png = f"{split}/{item.name}.png"
    return _Files(
        root / "images" / split / f"{item.name}{ending}",
        root / "instances" / png if has_objects else None,
        root / "labels" / png,
    )


def _claim(root: pathlib.Path, export: Export, pairs: list[tuple[Item, _Files]]) -> None:
    """Writes dataset.json. Raises ValueError if `root` holds anything else, or images are missing."""
    images = [item.image for item, _ in pairs if not item.embedded]
    if missing := [str(image) for image in images if not image.is_file()]:
        raise ValueError(f"no such file, for {len(missing)} images: {some(missing)}")
    read = {path.resolve() for item, _ in pairs for path in (item.image, *item.sources)}
    ours = {path for _, written in pairs for path in written}
    there = {p for kind in KINDS for p in (root / kind).rglob("[!.]*") if not p.is_dir()}
    if others := sorted(map(str, (there - ours) | (ours & read))):
        raise ValueError(
            f"{root} holds files that are not of this conversion: {some(others)}; choose another "
            "output, or remove them"
        )
    options: dict[str, Any] = {"classes": export.class_names, "ignored_values": [IGNORE_LABEL]}
    options |= {"palette": export.palette} if export.palette else {}
    path = root / "dataset.json"
    folder.check(options.copy(), path)
    if not path.exists():
        storage.write_json(path, options)
    elif files.read_json(path, "") != options:
        raise ValueError(
            f"{path} has other classes than this conversion; choose another output or, if you "
            "changed the file, remove it"
        )


def _convert(export: Export, item: Item, written: _Files) -> dict[str, int]:
    """Writes the files of an image, unless they are complete. Returns counts for the report."""
    about = repr((item.text, export.class_names, export.rest, export.has_objects))
    sources = item.sources if item.embedded else (item.image, *item.sources)
    digest = files.fingerprint(about, {f"{i} {path.name}": path for i, path in enumerate(sources)})
    is_there = written.label.exists()
    if is_there:
        with Image.open(written.label) as image:
            made = json.loads(image.info.get(_CHUNK, "null"))
        if made is None:
            raise ValueError(f"{written.label} is not of a conversion; choose another output")
        if made["digest"] == digest and all(path is None or path.exists() for path in written):
            return made["counts"] | {"kept": 1}
    data = item.embedded() if item.embedded else item.image.read_bytes()
    height, width, *_ = decode.image_header(io.BytesIO(data), str(item.image))
    try:
        label, objects, overlap = paint(export, item.layers((height, width)), (height, width))
    except OSError:
        raise
    except Exception as error:  # corrupt annotations can cause any exception
        where = [item.image, *item.sources][-1]
        raise ValueError(f"{where}: {error or type(error).__name__}") from error
    counts = {"overlap": overlap, "overlapping": int(overlap > 0)}
    counts["empty"] = int((label == export.ids[export.rest]).all())
    text = PngImagePlugin.PngInfo()
    text.add_text(_CHUNK, json.dumps({"digest": digest, "counts": counts}))
    with storage.atomic(written.image) as file:
        file.write(data)
    for path, pixels in ((written.instances, objects), (written.label, label)):
        if path:
            with storage.atomic(path) as file:
                Image.fromarray(pixels).save(file, "PNG", pnginfo=text)
    return counts | {"again": int(is_there)}


def paint(
    export: Export, layers: Iterable[Layer], shape: Shape
) -> tuple[UInt8[np.ndarray, "h w"], UInt16[np.ndarray, "h w"], int]:
    """Returns the label, the object numbers, and how many pixels are in more than one mask.

    Layers of the background and ignored ones belong to no object, whatever their key.

    Raises ValueError if a mask is not of the image's size, or if there are more than 65535 objects.
    """
    ids = export.ids
    label = np.full(shape, ids[export.rest], np.uint8)
    objects = np.zeros(shape, np.int32)
    shared = np.zeros(shape, bool)
    numbers: dict[Hashable, int] = {}
    for mask, name, key in layers:
        decode.check_same_size(label, mask, "the annotation")
        number = 0
        if key is not None and name not in (BACKGROUND, IGNORED):
            number = numbers.setdefault(key, len(numbers) + 1)
            shared |= mask & (objects > 0) & (objects != number)
        label[mask] = ids[name]
        objects[mask] = number
    if len(numbers) >= 2**16:
        raise ValueError(f"{len(numbers)} objects, but instance files number at most 65535")
    return label, objects.astype(np.uint16), int(shared.sum())


def main(argv: list[str]) -> None:
    form = getattr(flags.FLAGS, "from")
    read = FORMATS[form]
    values = {name: flags.FLAGS[name].value for name in SOURCES}
    given = {name: value for name, value in values.items() if value is not None}
    taken = inspect.signature(read).parameters
    needed = [name for name, of in taken.items() if of.default is of.empty]
    if wrong := (given.keys() - taken) | (set(needed) - given.keys()):
        raise ValueError(
            f"--{', --'.join(sorted(wrong))}: --from={form} needs "
            f"--{', --'.join(needed)} and takes --{', --'.join(taken)}"
        )
    output = flags.FLAGS.output
    report = convert(read(**given), output, flags.FLAGS.lists, flags.FLAGS.group)
    for name, line in report.items():
        print(f"{name}: {line}")
    print(f"{output} is ready: --config.data.name=folder --config.data.root={output}")


if __name__ == "__main__":
    flags.DEFINE_enum("from", None, list(FORMATS), "The format.", required=True)
    command.define_path("annotations", "JSON: of coco a file, of labelme a folder; or a pattern.")
    command.define_path("images", "The folder of the images, or a pattern; not of labelme.")
    command.define_path("masks", "The folder of the mask images, or a pattern.")
    command.define_path("colors", "Of colors: a file of lines NAME:RED,GREEN,BLUE.")
    flags.DEFINE_enum("crowd", None, ["ignored", "objects"], "Of coco: what crowds are.")
    command.define_folder("output", "The folder to write the dataset to.", required=True)
    command.define_folder("lists", "A folder of SPLIT.txt that list the NAMEs of each split.")
    flags.DEFINE_string("group", None, "Regular expression: what it matches stays in one split.")
    command.run(main)
