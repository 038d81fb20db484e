"""Reports what a dataset contains and what is wrong with it, before training.

    python -m dense_jax.data.doctor --name=folder --root=PATH [--json] [--picture=FILE.png]

The command opens every example of every split. The exit status is 1 if there are errors, such as an
unreadable example, an image that is in two splits, or a class that is in another split but not in
`train`. Warnings point out possible mistakes and do not change the exit status. If there is a
groups.csv, it is checked, too; see `dense_jax.data.folds`.
`--picture` draws some examples of each split, overlaid with their labels. Class 0 stays clear.
"""

import contextlib
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float, Int64
from PIL import Image

from dense_jax import class_colors, command, data, drawing
from dense_jax.data import balance, checks, decode, folds, levels, verify
from dense_jax.data.folder import Folder
from dense_jax.labels import IGNORE_LABEL
from dense_jax.spelling import some

Report = dict[str, Any]  # the report on one split


class _Facts(NamedTuple):
    """Statistics and hashes of one example."""

    name: str
    size: tuple[int, int]  # height and width in pixels
    extremes: tuple[float, float]  # the lowest and the highest value of the image
    counts: Int64[np.ndarray, "256"]  # number of pixels of each label value
    digest: bytes
    difference_hash: np.uint64
    looks_interpolated: bool
    edge_strengths: Float[np.ndarray, "moves moves"]


def examine(name: str, root: str) -> dict[str, Report]:
    """Returns {split: report}: train, val, test, then others. Each report has `errors`, `warnings`.

    An image that is in two splits is listed only in the report on the second split.
    """
    try:
        splits = sorted(data.DATASETS[name].splits(root), key=_place)
        if not splits:
            raise ValueError(f"{root}: no splits")
    except (ValueError, OSError) as error:
        return {"": {"errors": [str(error)], "warnings": []}}
    examined = {split: _examine_split(name, root, split) for split in splits}
    for first, second in itertools.combinations(splits, 2):
        if examined[first][1] and examined[second][1]:
            _compare(first, examined[first][1], second, *examined[second])
    reports = {split: report for split, (report, _) in examined.items()}
    if "train" in reports:
        _compare_classes(reports)
    names = {split: [example.name for example in facts] for split, (_, facts) in examined.items()}
    _check_groups(root, names, reports)
    return reports


def _place(split: str) -> tuple[int, str]:
    """Returns a key that sorts splits in the order in which they are used."""
    usual = ("train", "val", "validation", "test")
    return usual.index(split) if split in usual else len(usual), split


def _examine_split(name: str, root: str, split: str) -> tuple[Report, list[_Facts]]:
    try:
        source = data.open_dataset(name, root, split)
        num_channels = source.num_channels
    except (ValueError, OSError) as error:
        return {"errors": [str(error)], "warnings": []}, []
    facts, errors = verify.examine(source, _facts)
    counts = np.array([example.counts for example in facts], np.int64).reshape(-1, IGNORE_LABEL + 1)
    class_counts = counts[:, : source.num_classes]
    sizes = np.array([example.size for example in facts])
    extremes = [value for example in facts for value in example.extremes]
    low, high = (f"{choose(extremes, default=0):g}" for choose in (min, max))

    def by_class(numbers: np.ndarray) -> dict[str, int]:
        return dict(zip(source.class_names, numbers.tolist(), strict=True))

    in_regions = source.regions.pixels(class_counts) if source.regions else class_counts[:, :0]
    region_names = source.regions.names if source.regions else ()

    pixels = by_class(class_counts.sum(axis=0))
    missing = [name for name, count in pixels.items() if not count]
    interpolated = [example.name for example in facts if example.looks_interpolated]
    strengths = np.array([example.edge_strengths for example in facts])
    moved = checks.displacement(strengths) if facts else (0.0, 0.0)
    not_read = source.not_read if isinstance(source, Folder) else ""
    warnings = {
        f"the images hold {decode.values_without_range(source.dtype, low, high)}, or train with "
        "--config.model.normalization=percentiles": source.dtype != "uint8"
        and source.value_range is None,
        f"images are read from a single folder{not_read}": not_read,
        f"never seen: {', '.join(missing)}": missing,
        f"{len(interpolated)} labels have borders that run through other classes, as if they had been "
        "resized by interpolation or saved as JPEG (resize labels by nearest neighbor): "
        f"{some(interpolated)}": interpolated,
        _displacement_warning(moved): max(map(abs, moved)) > checks.DISPLACED,
    }
    report = {
        "num_examples": len(source),
        "num_channels": num_channels,
        "dtype": source.dtype,
        "min_size": sizes.min(axis=0).tolist() if facts else None,  # height, width
        "max_size": sizes.max(axis=0).tolist() if facts else None,
        "pixels": pixels,
        "images": by_class(np.count_nonzero(class_counts, axis=0)),  # number with each class
        "regions": {
            name: {"pixels": int(counts.sum()), "images": int(np.count_nonzero(counts))}
            for name, counts in zip(region_names, in_regions.T, strict=True)
        },
        "ignored_pixels": int(counts[:, IGNORE_LABEL].sum()),
        "class_weights": {
            method: compute(class_counts).tolist()
            for method, compute in balance.METHODS.items()
            if any(pixels.values())
        },
        "missing_classes": missing,
        "interpolated_labels": interpolated,
        "duplicates": [],  # pairs [OTHER_SPLIT/NAME, NAME in this split]
        "near_duplicates": [],
        "errors": errors,
        "warnings": [warning for warning, is_due in warnings.items() if is_due],
    }
    return report, facts


def _facts(example: dict[str, Any]) -> _Facts:
    image, label = example["image"], example["label"]
    return _Facts(
        name=example["name"],
        size=label.shape,
        extremes=(float(image.min()), float(image.max())),
        counts=np.bincount(label.ravel(), minlength=IGNORE_LABEL + 1),
        digest=checks.digest(image),
        difference_hash=checks.difference_hash(image),
        looks_interpolated=checks.looks_interpolated(label),
        edge_strengths=checks.edge_strengths(image, label),
    )


def _displacement_warning(moved: tuple[float, float]) -> str:
    down, right = moved
    places = [
        f"{abs(move):.1f} pixels {directions[move < 0]}"
        for move, directions in ((down, ("above", "below")), (right, ("left of", "right of")))
        if abs(move) > checks.DISPLACED
    ]
    return (
        f"labels lie {' and '.join(places)} the edges of the images, as if they had been resized or "
        "drawn so (a flip of the images along this axis turns the distance around)"
    )


def _compare(
    first: str, first_facts: list[_Facts], second: str, report: Report, facts: list[_Facts]
) -> None:
    """Adds to `report` the images of split `second` that equal or resemble one of split `first`."""
    names = {example.digest: example.name for example in first_facts}
    hashes = np.array([example.difference_hash for example in first_facts])
    equal, near = [], []
    for example in facts:
        bits_apart = np.bitwise_count(hashes ^ example.difference_hash)
        # All images without structure have similar hashes, so such images are not compared.
        is_flat = np.bitwise_count(example.difference_hash) <= checks.NEAR_BITS
        if example.digest in names:
            equal.append([f"{first}/{names[example.digest]}", example.name])
        elif bits_apart.min() <= checks.NEAR_BITS and not is_flat:
            near.append([f"{first}/{first_facts[bits_apart.argmin()].name}", example.name])
    report["duplicates"] += equal
    report["near_duplicates"] += near
    if equal:
        pairs = some([f"{second}/{name} = {other}" for other, name in equal])
        report["errors"].insert(0, f"{len(equal)} images are in {first} too, to the pixel: {pairs}")
    if near:
        pairs = some([f"{second}/{name} ~ {other}" for other, name in near])
        report["warnings"].append(f"{len(near)} images look like one of {first}: {pairs}")


def _compare_classes(reports: dict[str, Report]) -> None:
    """Adds an error to the train report for each class that occurs only in other splits.

    Also adds an error if every pixel of `train` is ignored.
    """
    train = reports["train"]
    for name in train.get("missing_classes", []):
        splits = [split for split, report in reports.items() if report.get("pixels", {}).get(name)]
        if splits:
            train["errors"].insert(
                0,
                f"class {name!r} is in {', '.join(splits)}, but not in train, so it cannot be learned",
            )
    if train.get("min_size") and not any(train["pixels"].values()):
        train["errors"].insert(0, "every pixel of every label is ignored: nothing can be learned")


def _check_groups(root: str, names: dict[str, list[str]], reports: dict[str, Report]) -> None:
    """Adds an error to each split of which groups.csv lists only a part of the images.

    Also adds a warning if a group has images in an earlier split. Images with names that both
    splits have are not compared, because groups.csv names no splits.
    """
    try:
        group_of = folds.read_groups(root) or {}
    except (ValueError, OSError) as error:
        reports[next(iter(reports))]["errors"].append(str(error))
        return
    listed = {split: group_of.keys() & names[split] for split in names}
    for split in filter(listed.get, names):
        try:
            folds.groups_of(root, names[split])
        except ValueError as error:
            reports[split]["errors"].append(str(error))
    for first, second in itertools.combinations(names, 2):
        ours, theirs = (
            {group_of[name] for name in listed[a] - listed[b]}
            for a, b in ((first, second), (second, first))
        )
        if shared := sorted(ours & theirs):
            reports[second]["warnings"].append(
                f"{len(shared)} groups of {folds.GROUPS} are in {first} too: {some(shared)}"
            )


def as_text(reports: dict[str, Report]) -> str:
    """Formats the reports from `examine` for a terminal."""
    lines = []
    for split, report in reports.items():
        errors, warnings = report["errors"], report["warnings"]
        lines += _table(split, report) if "pixels" in report else [f"{split}:"]
        lines += [f"  error: {error}" for error in errors[:10]]
        if len(errors) > 10:
            lines.append(f"  and {len(errors) - 10} errors more; --json lists them all")
        lines += [*(f"  warning: {warning}" for warning in warnings), ""]
    num_errors, num_warnings = (
        sum(len(report[kind]) for report in reports.values()) for kind in ("errors", "warnings")
    )
    verdict = "The data can be trained on."
    if num_errors:
        verdict = "Repair the errors before training."
    elif num_warnings:
        verdict = "The data can be trained on, if the warnings are no mistakes."
    return "\n".join([*lines, f"Errors: {num_errors}. Warnings: {num_warnings}. {verdict}"])


def _table(split: str, report: Report) -> list[str]:
    """Formats a report as a headline and one line per class, with counts and class weights."""
    extremes = filter(None, (report["min_size"], report["max_size"]))
    sizes = " to ".join(dict.fromkeys(f"{height} x {width}" for height, width in extremes))
    pixels = report["pixels"] | {"(ignored)": report["ignored_pixels"]}
    total = max(1, sum(pixels.values()))
    width = max(map(len, [*pixels, *report["regions"]]))
    weights = report["class_weights"]
    head = f"{split}: {report['num_examples']} examples, channels: {report['num_channels']}"
    if report["dtype"] != "uint8":
        head += f" of {report['dtype']}"
    columns = f"  {'class':{width}} {'pixels':>13} {'':9} {'images':>8}"
    lines = [
        f"{head}, height x width: {sizes or 'unknown'}",
        columns + "".join(f"  {method:>17}" for method in weights),
    ]
    for k, (name, count) in enumerate(pixels.items()):
        line = f"  {name:{width}} {count:>13} {100 * count / total:7.3f} %"
        if name in report["images"]:
            line += f" {report['images'][name]:>8}"
            line += "".join(f"  {class_weights[k]:17.4f}" for class_weights in weights.values())
        lines.append(line)
    valid = max(1, sum(report["pixels"].values()))
    for name, region in report["regions"].items():
        share = 100 * region["pixels"] / valid
        numbers = f"{region['pixels']:>13} {share:7.3f} % {region['images']:>8}"
        lines.append(f"  {name:{width}} {numbers}  region")
    return lines


def draw(name: str, root: str, splits: Iterable[str], path: str) -> None:
    """Writes a picture with a row of up to five examples per split, overlaid with their labels.

    The examples are evenly spaced. Unreadable examples are omitted because `examine` reports them.
    """
    rows, colors = [], {}
    for split in splits:
        with contextlib.suppress(ValueError, OSError):
            source = data.open_dataset(name, root, split)
            palette = class_colors.palette_of(source)
            colors = class_colors.colors_of(source.class_names, palette)
            pictures = {}
            rows.append((split, pictures))
            num_pictures = min(len(source), 5)
            for i in np.linspace(0, len(source) - 1, num_pictures).round().astype(int).tolist():
                with contextlib.suppress(ValueError, OSError):
                    example = source[i]
                    image = levels.picture(example["image"], value_range=source.value_range)
                    image = drawing.shrink(drawing.to_rgb(image))
                    label = drawing.shrink(example["label"].astype(np.uint8))
                    pictures[example["name"]] = drawing.overlay(image, label, palette)
    if rows:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        colors |= {"(ignored)": class_colors.IGNORED_COLOR}
        Image.fromarray(drawing.contact_sheet(rows, colors)).save(path)


def is_picture(path: str | None) -> bool:
    """Returns True if `path` is None or has the extension of a format that Pillow can write."""
    endings = Image.registered_extensions()
    return path is None or endings.get(pathlib.Path(path).suffix.lower()) in Image.SAVE


def main(argv: list[str]) -> None:
    name, root = flags.FLAGS.name, flags.FLAGS.root or ""
    if not root and not name.startswith("synthetic"):
        raise ValueError(f"--root is missing: the folder of {name!r}")
    reports = examine(name, root)
    print(json.dumps(reports, indent=1) if flags.FLAGS.json else as_text(reports))
    if flags.FLAGS.picture:
        draw(name, root, reports, flags.FLAGS.picture)
    sys.exit(any(report["errors"] for report in reports.values()))


if __name__ == "__main__":
    flags.DEFINE_enum("name", None, list(data.DATASETS), "Dataset.", required=True)
    command.define_folder("root", "The folder that holds the dataset's files.")
    flags.DEFINE_bool("json", False, "Print JSON instead of text.")
    command.define_path("picture", "Where to write a picture of examples with their labels.")
    flags.register_validator("picture", is_picture, "must have an image extension, such as .png")
    command.run(main)
