"""Says what is in a dataset and what is wrong with it, before you train.

    python -m dense_jax.data.doctor --name=folder --root=PATH [--json] [--picture=FILE.png]

Opens every example of every split. Exits with 1 if there are errors: examples that cannot be read,
images that are in two splits, classes that only other splits than `train` show. Warnings leave
the exit status alone: they may be as you want it. `--picture` draws some examples of each split
with their labels laid over them.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Int64
from PIL import Image

from dense_jax import command, data, plots
from dense_jax.data import balance, checks, verify
from dense_jax.data.files import some
from dense_jax.data.folder import Folder
from dense_jax.labels import IGNORE_LABEL


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What is kept of an example."""

    name: str
    size: tuple[int, int]  # height and width in pixels
    counts: Int64[np.ndarray, "256"]  # pixels of each label
    digest: bytes
    difference_hash: np.uint64
    looks_interpolated: bool


def examine(name: str, root: str) -> dict[str, Any]:
    """{split: what is in it}, `train` first; `errors` and `warnings` list what is wrong.

    An image that is in two splits is reported in the later one.
    """
    try:
        splits = sorted(data.DATASETS[name].splits(root), key=lambda split: split != "train")
    except (ValueError, OSError) as error:
        return {"": {"errors": [str(error)], "warnings": []}}
    if not splits:
        return {"": {"errors": [f"{root}: no splits"], "warnings": []}}
    report: dict[str, Any] = {}
    seen: dict[str, list[_Seen]] = {}
    for split in splits:
        report[split], seen[split] = _examine_split(name, root, split)
    for first, second in itertools.combinations(splits, 2):
        if seen[first] and seen[second]:
            _compare(first, seen[first], second, seen[second], report[second])
    if "train" in report:
        _miss_in_train(report)
    return report


def _examine_split(name: str, root: str, split: str) -> tuple[dict[str, Any], list[_Seen]]:
    try:
        source = data.open_dataset(name, root, split)
        num_channels = source.num_channels
    except (ValueError, OSError) as error:
        return {"errors": [str(error)], "warnings": []}, []
    seen, errors = verify.scan(source, _see)
    per_image = np.array([one.counts for one in seen], np.int64).reshape(-1, IGNORE_LABEL + 1)
    counts = per_image.sum(axis=0)
    per_image = per_image[:, : source.num_classes]
    sizes = np.array([one.size for one in seen])

    def by_class(numbers: np.ndarray) -> dict[str, int]:
        return dict(zip(source.class_names, numbers.tolist(), strict=True))

    pixels = by_class(counts[: source.num_classes])
    missing = [missing for missing, count in pixels.items() if not count]
    interpolated = [one.name for one in seen if one.looks_interpolated]
    warnings = []
    if isinstance(source, Folder) and (others := source.not_taken):
        warnings.append(f"images are read from one folder alone{others}")
    if missing:
        warnings.append(f"never seen: {', '.join(missing)}")
    if interpolated:
        warnings.append(
            f"{len(interpolated)} labels have borders that run through other classes, as if they "
            "had been resized by interpolation or saved as JPEG (resize labels by nearest "
            f"neighbor): {some(interpolated)}"
        )
    found = {
        "num_examples": len(source),
        "num_channels": num_channels,
        "min_size": sizes.min(axis=0).tolist() if seen else None,  # height, width
        "max_size": sizes.max(axis=0).tolist() if seen else None,
        "pixels": pixels,
        "images": by_class(np.count_nonzero(per_image, axis=0)),  # that show the class
        "ignored_pixels": int(counts[IGNORE_LABEL]),
        "class_weights": {
            method: compute(per_image).tolist()
            for method, compute in balance.METHODS.items()
            if any(pixels.values())
        },
        "missing_classes": missing,
        "interpolated_labels": interpolated,
        "duplicates": [],  # [SPLIT/NAME, NAME here]
        "near_duplicates": [],
        "errors": errors,
        "warnings": warnings,
    }
    return found, seen


def _see(example: dict[str, Any]) -> _Seen:
    image, label = example["image"], example["label"]
    return _Seen(
        name=example["name"],
        size=label.shape,
        counts=np.bincount(label.ravel(), minlength=IGNORE_LABEL + 1),
        digest=checks.digest(image),
        difference_hash=checks.difference_hash(image),
        looks_interpolated=checks.looks_interpolated(label),
    )


def _compare(
    first: str, there: list[_Seen], second: str, here: list[_Seen], found: dict[str, Any]
) -> None:
    """Adds to what was found in the split `second` the images that `first` has too."""
    names = {one.digest: one.name for one in there}
    hashes = np.array([one.difference_hash for one in there])
    equal, near = [], []
    for one in here:
        bits_apart = np.bitwise_count(hashes ^ one.difference_hash)
        flat = np.bitwise_count(one.difference_hash) <= checks.NEAR_BITS  # all such look the same
        if one.digest in names:
            equal.append([f"{first}/{names[one.digest]}", one.name])
        elif bits_apart.min() <= checks.NEAR_BITS and not flat:
            near.append([f"{first}/{there[bits_apart.argmin()].name}", one.name])
    found["duplicates"] += equal
    found["near_duplicates"] += near
    if equal:
        pairs = some([f"{second}/{name} = {other}" for other, name in equal])
        found["errors"].insert(0, f"{len(equal)} images are in {first} too, to the pixel: {pairs}")
    if near:
        pairs = some([f"{second}/{name} ~ {other}" for other, name in near])
        found["warnings"].append(f"{len(near)} images look like one of {first}: {pairs}")


def _miss_in_train(report: dict[str, Any]) -> None:
    """Adds the errors that a class is in other splits only, and that train shows none at all."""
    train = report["train"]
    for missing in train.get("missing_classes", []):
        others = [split for split, found in report.items() if found.get("pixels", {}).get(missing)]
        if others:
            train["errors"].insert(
                0, f"class {missing!r} is in {', '.join(others)}, but not in train to be learnt"
            )
    if train.get("min_size") and not any(train["pixels"].values()):
        train["errors"].insert(0, "every pixel of every label is ignored: nothing can be learnt")


def as_text(report: dict[str, Any]) -> str:
    """The report of `examine` for a terminal."""
    lines = []
    for split, found in report.items():
        if "pixels" in found:
            ends = filter(None, (found["min_size"], found["max_size"]))
            sizes = " to ".join(dict.fromkeys(f"{height} x {width}" for height, width in ends))
            lines.append(
                f"{split}: {found['num_examples']} examples, channels: {found['num_channels']}, "
                f"height x width: {sizes or 'unknown'}"
            )
            lines += _table(found)
        else:
            lines.append(f"{split}:")
        lines += [f"  error: {error}" for error in found["errors"][:10]]
        if len(found["errors"]) > 10:
            lines.append(f"  and {len(found['errors']) - 10} errors more; --json lists them all")
        lines += [f"  warning: {warning}" for warning in found["warnings"]]
        lines.append("")
    num_errors, num_warnings = (
        sum(len(found[kind]) for found in report.values()) for kind in ("errors", "warnings")
    )
    return "\n".join([*lines, f"{num_errors} errors, {num_warnings} warnings"])


def _table(found: dict[str, Any]) -> list[str]:
    """A row per class: its pixels, the images that show it, its weights."""
    weights = found["class_weights"]
    total = max(1, sum(found["pixels"].values()) + found["ignored_pixels"])
    width = max(len("(ignored)"), *map(len, found["pixels"]))

    def row(name: str, pixels: int) -> str:
        return f"  {name:{width}} {pixels:>13} {100 * pixels / total:7.3f} %"

    lines = [f"  {'class':{width}} {'pixels':>13} {'':9} {'images':>8}"]
    lines[0] += "".join(f"  {method:>17}" for method in weights)
    for k, (name, pixels) in enumerate(found["pixels"].items()):
        columns = "".join(f"  {of_class[k]:17.4f}" for of_class in weights.values())
        lines.append(f"{row(name, pixels)} {found['images'][name]:>8}{columns}")
    return [*lines, row("(ignored)", found["ignored_pixels"])]


def draw(name: str, root: str, splits: Iterable[str], path: str) -> None:
    """Writes a picture: a row of examples per split, spread evenly, under their labels' colors.

    What cannot be read is left out; `examine` has said why.
    """
    rows, colors = [], {}
    for split in splits:
        with contextlib.suppress(ValueError, OSError):
            source = data.open_dataset(name, root, split)
            palette = plots.palette_of(source)
            colors = plots.colors_of(source.class_names, palette)
            pictures = {}
            rows.append((split, pictures))
            num_pictures = min(len(source), 5)
            for i in np.linspace(0, len(source) - 1, num_pictures).round().astype(int).tolist():
                with contextlib.suppress(ValueError, OSError):
                    example = source[i]
                    image = plots.shrink(plots.to_rgb(example["image"]))
                    label = plots.shrink(example["label"].astype(np.uint8))
                    pictures[example["name"]] = plots.overlay(image, label, palette)
    if rows:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        colors |= {"(ignored)": plots.IGNORED_COLOR}
        Image.fromarray(plots.contact_sheet(rows, colors)).save(path)


def is_picture(path: str | None) -> bool:
    """Whether pictures can be written to a file of this name; None is no file."""
    endings = Image.registered_extensions()
    return path is None or endings.get(pathlib.Path(path).suffix.lower()) in Image.SAVE


def main(argv: list[str]) -> None:
    name, root = flags.FLAGS.name, flags.FLAGS.root or ""
    if not root and not name.startswith("synthetic"):
        raise ValueError(f"--root is missing: the folder of {name!r}")
    report = examine(name, root)
    print(json.dumps(report, indent=1) if flags.FLAGS.json else as_text(report))
    if flags.FLAGS.picture:
        draw(name, root, report, flags.FLAGS.picture)
    sys.exit(any(found["errors"] for found in report.values()))


if __name__ == "__main__":
    flags.DEFINE_enum("name", None, list(data.DATASETS), "Dataset.", required=True)
    command.define_folder("root", "The folder that holds its files.")
    flags.DEFINE_bool("json", False, "Print JSON instead of text.")
    command.define_path("picture", "Where to write a picture of examples with their labels.")
    flags.register_validator("picture", is_picture, "must end as a picture does, such as .png")
    command.run(main)
