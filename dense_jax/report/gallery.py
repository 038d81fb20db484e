"""What the page's gallery shows: the images of a split, and what each row made of them.

The predictions are what `python -m dense_jax.evaluate` keeps beside its scores. Images and labels
come from the dataset; without it, only predictions are shown.
"""

import base64
import contextlib
import io
import math
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dense_jax import data, metrics, plots
from dense_jax.data import decode
from dense_jax.evaluation import class_maps as predictions
from dense_jax.labels import IGNORE_LABEL
from dense_jax.report.reading import Run, read_array, read_json
from dense_jax.report.runs import Row


class Evaluated(NamedTuple):
    """A row that can be shown, by one of its runs."""

    row: int
    run: Run
    names: tuple[str, ...]  # of the split's images
    matrices: np.ndarray  # confusion matrices, [n, c, c]
    pictures: pathlib.Path

    @property
    def truth(self) -> np.ndarray:
        """Pixels of each class in each image's label, [n, c]."""
        return self.matrices.sum(axis=2)


def build(rows: Sequence[Row], limit: int) -> dict[str, Any] | None:
    """The `limit` images that the first row does worst on, as the page's script takes them.

    A row is shown by its first run that has kept its predictions; only rows evaluated on the same
    images are shown together. None if there are none.
    """
    found = [one for i, row in enumerate(rows) if (one := _evaluated(i, row)) is not None]
    if not found or limit < 1:
        return None
    first = found[0]
    shown = [
        one for one in found if one.names == first.names and np.array_equal(one.truth, first.truth)
    ]
    numbers = np.argsort(metrics.mean_iou_of_each(first.matrices))[
        :limit
    ].tolist()  # without a score: last
    evaluation = first.run.evaluation or {}
    dataset = read_json(first.run.folder / "dataset.json") or {}
    classes = evaluation["class_names"]
    palette = plots.default_palette(len(classes))
    with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):  # none, or damaged
        palette = np.array(dataset["palette"], np.uint8).reshape(palette.shape)
    examples, missing = _examples(first, numbers)
    predicted = [(one, each) for one in shown if (each := _predicted(one, numbers)) is not None]
    if not predicted:
        return None

    images: list[dict[str, Any]] = []
    truths: list[np.ndarray | None] = []
    for i, example in zip(numbers, examples, strict=True):
        image: dict[str, Any] = {"name": first.names[i], "input": None, "truth": None}
        truth = None
        if example:
            image["input"] = _uri(
                Image.fromarray(plots.shrink(plots.to_rgb(example["image"]))), "JPEG"
            )
            truth = plots.shrink(example["label"].astype(np.uint8))
            image["truth"] = _classes_uri(truth, palette)
        images.append(image)
        truths.append(truth)
    return {
        "about": _about(rows, first, [one for one, _ in predicted], len(numbers), missing),
        "legend": plots.colors_of(classes, palette) | plots.MARKS,
        "images": images,
        "rows": [
            _of_row(one, rows[one.row], numbers, classes, truths, palette)
            for one, classes in predicted
        ],
    }


def _evaluated(i: int, row: Row) -> Evaluated | None:
    """None if no run has been evaluated, or only by a version that kept no predictions."""
    for run in row.runs:
        if run.evaluation:
            k = len(run.evaluation["class_names"])
            names = read_array(run, "names", (), "U")
            matrices = read_array(run, "confusion_matrices", (k, k))
            path = run.folder / f"evaluation_{run.evaluation['split']}.zip"
            if names is None or matrices is None or len(names) != len(matrices):
                continue
            if zipfile.is_zipfile(path):
                return Evaluated(i, run, tuple(names.tolist()), matrices, path)
    return None


def _predicted(one: Evaluated, numbers: Sequence[int]) -> list[np.ndarray] | None:
    """None if the pictures are damaged."""
    with contextlib.suppress(ValueError), decode.reading(str(one.pictures)):
        return predictions.read(one.pictures, numbers)
    return None


def _examples(one: Evaluated, numbers: Sequence[int]) -> tuple[list[dict[str, Any] | None], str]:
    """The examples, and why they are None if they are."""
    evaluation = one.run.evaluation or {}
    try:
        where = evaluation["dataset"], evaluation["root"], evaluation["split"]
        source = data.open_dataset(*where)
        examples = [source[i] for i in numbers if source.names == one.names]
        counts = [
            np.bincount(example["label"].ravel(), minlength=IGNORE_LABEL + 1)
            for example in examples
        ]
        if [list(each[: source.num_classes]) for each in counts] != one.truth[numbers].tolist():
            raise ValueError(f"{evaluation['root']} now holds other images")
        return list(examples), ""
    except (ValueError, OSError, KeyError, TypeError) as error:
        return [None] * len(numbers), str(error)


def _about(
    rows: Sequence[Row],
    first: Evaluated,
    shown: Sequence[Evaluated],
    num_images: int,
    missing: str,
) -> str:
    split = (first.run.evaluation or {})["split"]
    about = (
        f"{num_images} of the {len(first.names)} images of {split}: those that row {first.row + 1} "
        "does worst on, by the mean IoU of the image alone. Each row is shown by one seed, from the "
        f"checkpoint that was evaluated, in the order of the left one's scores; pictures are at most "
        f"{plots.LONGEST} pixels long."
    )
    if missing:
        about += f" Only predictions are shown, since the data is not here: {missing}."
    if without := sorted(set(range(len(rows))) - {one.row for one in shown}):
        listed = ", ".join(str(i + 1) for i in without)
        about += f" Without predictions of these images: row {listed}."
    return about


def _of_row(
    one: Evaluated,
    row: Row,
    numbers: Sequence[int],
    predicted: Sequence[np.ndarray],
    truths: Sequence[np.ndarray | None],
    palette: np.ndarray,
) -> dict[str, Any]:
    pictures, errors = [], []
    for classes, truth in zip(predicted, truths, strict=True):
        guess = plots.shrink(classes)
        wrong = None
        if truth is not None:
            found = plots.mistakes(truth, guess)
            wrong = _uri(plots.indexed(found, plots.ERROR_COLORS), "PNG", transparency=0)
            guess = np.where(truth == IGNORE_LABEL, IGNORE_LABEL, guess)
        pictures.append(_classes_uri(guess, palette))
        errors.append(wrong)
    scores = metrics.mean_iou_of_each(one.matrices[numbers]).tolist()
    return {
        "row": one.row,
        "label": f"{one.row + 1}: {', '.join(row.label)}",
        "scores": [None if math.isnan(score) else score for score in scores],
        "predictions": pictures,
        "errors": errors,
    }


def _classes_uri(classes: np.ndarray, palette: np.ndarray) -> str:
    """Ignored pixels are white, as one more class: so a picture of few classes has few bits."""
    classes = np.where(classes == IGNORE_LABEL, len(palette), classes).astype(np.uint8)
    colors = np.concatenate([palette, np.array([plots.IGNORED_COLOR], np.uint8)])
    return _uri(plots.indexed(classes, colors), "PNG")


def _uri(picture: Image.Image, kind: str, **options: int) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    content = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{content}"
