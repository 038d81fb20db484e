"""Says what is in a dataset and what is wrong with it.

    python -m dense_jax.data.doctor --name=folder --root=PATH [--json]

Opens every example of every split; exits with 1 if any of them is bad.
"""

import json
import sys
from typing import Any

import numpy as np
from absl import app, flags
from jaxtyping import Int64

from dense_jax import data
from dense_jax.data import balance, verify
from dense_jax.labels import IGNORE_LABEL


def examine(name: str, root: str) -> dict[str, Any]:
    """{split: what is in it}; `errors` lists what is wrong."""
    try:
        splits = data.DATASETS[name].splits(root)
    except ValueError as error:
        return {"": {"errors": [str(error)]}}
    return {split: _examine_split(name, root, split) for split in splits}


def _examine_split(name: str, root: str, split: str) -> dict[str, Any]:
    try:
        source = data.open_dataset(name, root, split)
        num_channels = source.num_channels
    except ValueError as error:
        return {"errors": [str(error)]}
    good, errors = verify.scan(source, _measure)
    per_image = np.array([counts for _, counts in good], np.int64).reshape(-1, IGNORE_LABEL + 1)
    counts = per_image.sum(axis=0)
    sizes = np.array([size for size, _ in good])
    pixels = dict(zip(source.class_names, counts[: source.num_classes].tolist(), strict=True))
    return {
        "num_examples": len(source),
        "num_channels": num_channels,
        "min_size": sizes.min(axis=0).tolist() if good else None,  # height, width
        "max_size": sizes.max(axis=0).tolist() if good else None,
        "pixels": pixels,
        "ignored_pixels": int(counts[IGNORE_LABEL]),
        "class_weights": {
            method: compute(per_image[:, : source.num_classes]).tolist()
            for method, compute in balance.METHODS.items()
            if any(pixels.values())
        },
        "missing_classes": [missing for missing, count in pixels.items() if not count],
        "errors": errors,
    }


def _measure(example: dict[str, Any]) -> tuple[tuple[int, ...], Int64[np.ndarray, "256"]]:
    label = example["label"]
    return label.shape, np.bincount(label.ravel(), minlength=IGNORE_LABEL + 1)


def as_text(report: dict[str, Any]) -> str:
    """The report of `examine` for a terminal."""
    lines = []
    for split, found in report.items():
        if "pixels" in found:
            total = max(1, sum(found["pixels"].values()) + found["ignored_pixels"])
            lines.append(
                f"{split}: {found['num_examples']} examples, {found['num_channels']} channels, "
                f"height and width {found['min_size']} to {found['max_size']}"
            )
            for name, count in [*found["pixels"].items(), ("(ignored)", found["ignored_pixels"])]:
                lines.append(f"  {name:20} {count:>14} pixels {100 * count / total:7.3f} %")
            for method, weights in found["class_weights"].items():
                lines.append(f"  {method}: {', '.join(f'{weight:.4f}' for weight in weights)}")
            if found["missing_classes"]:
                lines.append(f"  never seen: {', '.join(found['missing_classes'])}")
        else:
            lines.append(f"{split}:")
        lines += [f"  error: {error}" for error in found["errors"]]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    report = examine(flags.FLAGS.name, flags.FLAGS.root)
    print(json.dumps(report, indent=1) if flags.FLAGS.json else as_text(report))
    sys.exit(any(found["errors"] for found in report.values()))


if __name__ == "__main__":
    flags.DEFINE_enum("name", None, list(data.DATASETS), "Dataset.", required=True)
    flags.DEFINE_string("root", "", "The folder that holds its files.")
    flags.DEFINE_bool("json", False, "Print JSON instead of text.")
    app.run(main)
