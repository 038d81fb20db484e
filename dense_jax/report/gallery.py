"""Builds the gallery of report.html: images of a split, with each table row's predictions.

The predictions are the class maps from `python -m dense_jax.evaluate`. Images and labels come from
the dataset. If the dataset is unavailable, only predictions are shown.
"""

import base64
import contextlib
import io
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dense_jax import class_colors, drawing, metrics, regions
from dense_jax.data import decode, folds, levels
from dense_jax.evaluation import class_maps
from dense_jax.labels import IGNORE_LABEL
from dense_jax.report.reading import RunFolder
from dense_jax.report.rows import Row


class Evaluated(NamedTuple):
    """The evaluated run that represents a row of the report in the gallery."""

    number: int  # the index of the row
    run: RunFolder
    names: tuple[str, ...]  # the names of the split's images
    matrices: np.ndarray  # the confusion matrix of each image, [n, c, c]
    path: pathlib.Path  # the archive of class maps

    @property
    def truth(self) -> np.ndarray:
        """Returns the number of pixels of each class or region in each image's label map, [n, c]."""
        return metrics.pixel_counts(self.matrices, self.matrices.ndim == 4).true


def build(rows: Sequence[Row], limit: int = 12) -> dict[str, Any] | None:
    """Returns the gallery as data for the page's script, or None if there is nothing to show.

    The first run with predictions represents its row of the report. The first row with such a run
    is the reference. The gallery shows the `limit` images with the lowest mean IoU in the reference
    row. It leaves out rows that were evaluated on other images than the reference row.
    """
    evaluated = [e for i, row in enumerate(rows) if (e := _evaluated(i, row)) is not None]
    if not evaluated:
        return None
    first = evaluated[0]
    scores = metrics.image_mean_ious(first.matrices)
    numbers = np.argsort(scores)[:limit].tolist()  # images without a score come last
    predicted = [
        (e, maps)
        for e in evaluated
        if e.names == first.names
        and np.array_equal(e.truth, first.truth)
        and (maps := _predicted(e, numbers)) is not None
    ]
    if not predicted:
        return None
    class_names = first.run.evaluation["class_names"]
    if own := first.run.evaluation.get("regions"):
        class_names = [regions.OUTSIDE, *own]
    stored = None if own else first.run.dataset.get("palette")
    palette = class_colors.default_palette(len(class_names))
    palette = palette if stored is None else np.array(stored, np.uint8)
    examples, missing = _examples(first, numbers)
    truths = [drawing.shrink(x["flat"].astype(np.uint8)) if x else None for x in examples]
    images = [
        {
            "name": first.names[i],
            "input": x
            and _uri(Image.fromarray(drawing.shrink(drawing.to_rgb(x["image"]))), "JPEG"),
            "truth": None if truth is None else _classes_uri(truth, palette),
        }
        for i, x, truth in zip(numbers, examples, truths, strict=True)
    ]
    shown = [e.number for e, _ in predicted]
    return {
        "about": _about(first, len(numbers), missing, set(range(len(rows))) - set(shown)),
        "legend": class_colors.colors_of(class_names, palette) | class_colors.MARKS,
        "images": images,
        "rows": [
            {
                "row": e.number,
                "label": f"{e.number + 1}: {rows[e.number].name}",
                "scores": metrics.image_mean_ious(e.matrices[numbers]).tolist(),
                **_pictures(maps, truths, palette),
            }
            for e, maps in predicted
        ],
    }


def _evaluated(i: int, row: Row) -> Evaluated | None:
    """Returns the first run of row i that has confusion matrices and class maps, or None."""
    for run in row.runs:
        if run.evaluation and (images := run.images()):
            path = run.folder / f"evaluation_{run.evaluation['split']}.zip"
            if zipfile.is_zipfile(path):
                return Evaluated(i, run, *images, path)
    return None


def _predicted(evaluated: Evaluated, numbers: Sequence[int]) -> list[np.ndarray] | None:
    """Reads the class maps of the images with indices `numbers`, or returns None on failure."""
    with contextlib.suppress(ValueError), decode.reading(str(evaluated.path)):
        return class_maps.read(evaluated.path, numbers)
    return None


def _examples(
    evaluated: Evaluated, numbers: Sequence[int]
) -> tuple[list[dict[str, Any] | None], str]:
    """Returns the examples with indices `numbers`, and an error message or "".

    If the data cannot be read or has changed, each example is None.
    """
    evaluation = evaluated.run.evaluation
    try:
        config = {**evaluated.run.data, "name": evaluation["dataset"]}
        source = folds.open_split(config, evaluation["split"], evaluation["root"])
        examples = [source[i] for i in numbers if source.names == evaluated.names]
        for example in examples:
            example["flat"] = regions.flat(example["label"], source.regions)
            example["image"] = levels.picture(example["image"], value_range=source.value_range)
        counts = [
            np.bincount(example["label"].ravel(), minlength=IGNORE_LABEL + 1)[: source.num_classes]
            for example in examples
        ]
        if source.regions:
            counts = [source.regions.pixels(image) for image in counts]
        if not np.array_equal(counts, evaluated.truth[numbers]):
            raise ValueError(f"{evaluation['root']} now holds other images")
        return list(examples), ""
    except (ValueError, OSError) as error:
        return [None] * len(numbers), str(error)


def _about(first: Evaluated, num_images: int, missing: str, without: set[int]) -> str:
    fold, split = first.run.scored_fold, first.run.evaluation["split"]
    split += "" if fold is None else f" {fold}"
    about = (
        f"The {num_images} of {len(first.names)} images of {split} with "
        f"the lowest mean IoU in row {first.number + 1}. Each row shows the predictions of one "
        "seed's evaluated checkpoint. Images are sorted by the left row's scores and are at most "
        f"{drawing.LONGEST} pixels long."
    )
    if missing:
        about += f" Only predictions are shown, since the data is not here: {missing}."
    if without:
        listed = ", ".join(str(i + 1) for i in sorted(without))
        about += f" Without predictions of these images: row {listed}."
    return about


def _pictures(
    maps: Sequence[np.ndarray], truths: Sequence[np.ndarray | None], palette: np.ndarray
) -> dict[str, list[str | None]]:
    """Returns data URIs of predictions and error maps. Without a label, the error map is None."""
    predictions, errors = [], []
    for guess, truth in zip(map(drawing.shrink, maps), truths, strict=True):
        error = None
        if truth is not None:
            wrong = class_colors.indexed(drawing.mistakes(truth, guess), class_colors.ERROR_COLORS)
            error = _uri(wrong, "PNG", transparency=0)
            guess = np.where(truth == IGNORE_LABEL, IGNORE_LABEL, guess)
        predictions.append(_classes_uri(guess, palette))
        errors.append(error)
    return {"predictions": predictions, "errors": errors}


def _classes_uri(classes: np.ndarray, palette: np.ndarray) -> str:
    """Returns a class map as a PNG data URI, in which ignored pixels are white."""
    # Replace IGNORE_LABEL (255), which would need 8 bits per pixel even for few classes.
    classes = np.where(classes == IGNORE_LABEL, len(palette), classes).astype(np.uint8)
    colors = np.concatenate([palette, np.array([class_colors.IGNORED_COLOR], np.uint8)])
    return _uri(class_colors.indexed(classes, colors), "PNG")


def _uri(picture: Image.Image, kind: str, **options: int) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    content = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{content}"
