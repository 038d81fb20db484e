"""Compares our losses and metrics with other libraries: python -m benchmarks.conformance

Writes docs/conformance.md. The libraries need not be installed, because their results are stored in
peers.json. To add a result, put the result in peers.json, and an equivalent expression of our
functions in TABLES. If none exists, give the reason in NO_COUNTERPART. The page's last table lists
the tests that have a comment `# NUMBER. PROJECT#ISSUE: complaint` above them.
"""

import collections
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dense_jax import metrics
from dense_jax.evaluation.tables import markdown_table
from dense_jax.labels import IGNORE_LABEL
from dense_jax.losses import LOSSES

REPOSITORY = pathlib.Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "conformance.md"
PEERS = json.loads(pathlib.Path(__file__).with_name("peers.json").read_text())
CASES = ("full", "ign", "abs", "img")
SAME = "The same definition."
MONAI = 'per="image", absent="one", smooth=1e-5'

# Title: (our default, {peer: (our equivalent expression, why it differs from our default)}).
# The page shows the expressions, which may use the names from `names`.
TABLES = {
    "Cross-entropy": (
        "cross_entropy(*x)",
        {
            "MMSegmentation CrossEntropyLoss()": (
                "cross_entropy(*x) * valid",
                "Divides by all pixels: the more are ignored, the less the others count.",
            ),
            "SMP SoftCrossEntropyLoss(smooth_factor=0.1)": (
                "cross_entropy(*x, label_smoothing=0.1) * valid",
                "Divides by all pixels, as above.",
            ),
            "torch CrossEntropyLoss()": ("cross_entropy(*x)", SAME),
            "torch CrossEntropyLoss(label_smoothing=0.1)": (
                "cross_entropy(*x, label_smoothing=0.1)",
                "An option.",
            ),
            "torch CrossEntropyLoss(weight=[1, 2, 4])": (
                "cross_entropy(*x, class_weights=(1, 2, 4))",
                "An option.",
            ),
        },
    ),
    "Soft Dice": (
        "soft_dice(*x)",
        {
            "MONAI DiceLoss()": (
                f"soft_dice(*x, {MONAI})",
                "Scores each image by itself; false positives of a class absent there cost 1.",
            ),
            "MONAI DiceLoss(batch=True)": (
                'soft_dice(*x, absent="one", smooth=1e-5)',
                "False positives of an absent class cost 1.",
            ),
            "MONAI DiceLoss(include_background=False)": (
                f"soft_dice(*x, {MONAI}, include_background=False)",
                "As MONAI's default, without class 0.",
            ),
            "MONAI DiceLoss(smooth_nr=0, smooth_dr=0)": (
                'soft_dice(*x, per="image", absent="one")',
                "As MONAI's default.",
            ),
            "MONAI DiceLoss(squared_pred=True)": (
                f"soft_dice(*x, {MONAI}, squared=True)",
                "As MONAI's default, with squares.",
            ),
            "MONAI DiceLoss(weight=[1, 2, 4])": (
                f"soft_dice(*x, {MONAI}, class_weights=(1, 2, 4)) * 7 / 3",
                "Multiplies by the weights without dividing by their mean.",
            ),
            "nnU-Net MemoryEfficientSoftDiceLoss(batch_dice=False)": (
                f"soft_dice(*x, {MONAI}, include_background=False) - 1",
                "Leaves class 0 and the constant 1 out.",
            ),
            "nnU-Net MemoryEfficientSoftDiceLoss(batch_dice=True)": (
                'soft_dice(*x, absent="one", smooth=1e-5, include_background=False) - 1',
                "Leaves class 0 and the constant 1 out.",
            ),
            "optax dice_loss()": (
                '[soft_dice(*image, absent="one", smooth=2) for image in images]',
                "One value per image; the 1 is added to half of our fraction.",
            ),
            "SMP DiceLoss()": (
                'soft_dice(*x, absent="zero")',
                "An absent class counts with loss 0: batches with fewer classes cost less.",
            ),
            "SMP DiceLoss(log_loss=True)": (
                "np.mean([-np.log(1 - soft_dice(*x, class_weights=one)) for one in np.eye(3)])",
                "Takes the logarithm of each class's Dice, then the mean.",
            ),
            "SMP DiceLoss(smooth=1)": (
                'soft_dice(*x, absent="zero", smooth=2)',
                "As SMP's default; the 1 is added to half of our fraction.",
            ),
        },
    ),
    "Cross-entropy + soft Dice": (
        "dice_ce(*x)",
        {
            "MONAI DiceCELoss()": (f"dice_ce(*x, {MONAI})", "The Dice part is MONAI's, as above."),
        },
    ),
    "Soft Jaccard": (
        "soft_jaccard(*x)",
        {
            "MONAI DiceLoss(jaccard=True)": (f"soft_jaccard(*x, {MONAI})", "As MONAI's Dice."),
            "SMP JaccardLoss()": (
                'soft_jaccard(*x, absent="zero")',
                "An absent class counts with loss 0.",
            ),
        },
    ),
    "Generalized Dice": (
        "generalized_dice(*x)",
        {
            "MONAI GeneralizedDiceLoss()": (
                'generalized_dice(*x, per="image", absent="one", smooth=1e-5)',
                "Scores each image by itself; an absent class counts as the rarest class there.",
            ),
            "optax multiclass_generalized_dice_loss()": (
                (
                    'np.mean([soft_dice(*image, absent="one", smooth=2, class_weights=1 / '
                    "(counts.sum(axis=1) ** 2 + 1e-7)) for image in images])"
                ),
                "Not one fraction, but a mean of soft Dice whose weights an absent class decides.",
            ),
        },
    ),
    "Tversky": (
        "tversky(*x)",
        {
            "SMP TverskyLoss(alpha=0.3, beta=0.7)": (
                'tversky(*x, alpha=0.3, beta=0.7, absent="zero")',
                "An absent class counts with loss 0.",
            ),
        },
    ),
    "Lovász-softmax": (
        "lovasz_softmax(*x)",
        {
            "SMP LovaszLoss()": ("lovasz_softmax(*x)", SAME),
            "SMP LovaszLoss(per_image=True)": ('lovasz_softmax(*x, per="image")', "An option."),
        },
    ),
    "Focal": (
        "focal(*x)",
        {
            "SMP FocalLoss()": (
                "focal(*one_vs_rest(x))",
                "One sigmoid per class against the rest; ours is over the softmax.",
            ),
        },
    ),
    "Confusion matrix": (
        "counts",
        {
            "FCN score.py, confusion matrix": ("counts", SAME),
            "torchmetrics MulticlassConfusionMatrix()": ("counts", SAME),
        },
    ),
    "Pixel accuracy": (
        's["pixel_accuracy"]',
        {
            "FCN score.py, overall accuracy": ('s["pixel_accuracy"]', SAME),
            'SMP accuracy(reduction="micro")': (
                's["binary_accuracy"].mean()',
                "Each class against the rest, averaged: true negatives make it much larger.",
            ),
            "torchmetrics segmentation.DiceScore(), micro, global": (
                's["pixel_accuracy"]',
                "Another name: Dice of all classes' pixels together is pixel accuracy.",
            ),
            "torchmetrics segmentation.DiceScore(), micro, samplewise": (
                'each["pixel_accuracy"].mean()',
                "Averages over images.",
            ),
        },
    ),
    "Mean accuracy": (
        's["mean_accuracy"]',
        {
            "FCN score.py, mean accuracy": ('s["mean_accuracy"]', SAME),
            'torchmetrics MulticlassAccuracy(average="macro")': (
                'np.nanmean(np.fmax(s["accuracy"], s["iou"]))',
                "A class that is predicted but not in the labels counts as 0.",
            ),
        },
    ),
    "IoU per class": (
        's["iou"]',
        {
            "FCN score.py, per-class IU": ('s["iou"]', SAME),
            'torchmetrics MulticlassJaccardIndex(average="none")': ('s["iou"]', SAME),
            "torchmetrics segmentation.MeanIoU(per_class=True)": (
                'np.nanmean(each["iou"], axis=0)',
                "Averages over images.",
            ),
        },
    ),
    "Mean IoU": (
        's["mean_iou"]',
        {
            "FCN score.py, mean IU": ('s["mean_iou"]', SAME),
            "metrax IoU(), all classes": (
                'np.nan_to_num(s["iou"]).mean()',
                "A class that is nowhere counts as 0.",
            ),
            "MMSegmentation IoUMetric(), mIoU": ('s["mean_iou"]', SAME),
            "MONAI MeanIoU()": (
                'np.nanmean(labeled("iou"), axis=1).mean()',
                "Averages over the images that have the class: false positives elsewhere are free.",
            ),
            'SMP iou_score(reduction="macro")': (
                'np.nan_to_num(s["iou"], nan=1).mean()',
                "A class that is nowhere counts as 1.",
            ),
            'SMP iou_score(reduction="macro-imagewise")': (
                'np.nan_to_num(each["iou"], nan=1).mean()',
                "Averages over images. A class that is nowhere in an image counts as 1.",
            ),
            'SMP iou_score(reduction="micro")': (
                's["pixel_accuracy"] / (2 - s["pixel_accuracy"])',
                "All classes' pixels together: a function of pixel accuracy alone.",
            ),
            'SMP iou_score(reduction="micro-imagewise")': (
                'np.mean(each["pixel_accuracy"] / (2 - each["pixel_accuracy"]))',
                "As micro, averaged over images.",
            ),
            'SMP iou_score(reduction="weighted"), weights 1/3': (
                'np.nan_to_num(s["iou"], nan=1).mean()',
                "As macro.",
            ),
            'SMP iou_score(reduction="weighted-imagewise"), weights 1/3': (
                'np.nan_to_num(each["iou"], nan=1).mean() / 3',
                "Divides by the number of classes twice.",
            ),
            'torchmetrics MulticlassJaccardIndex(average="macro")': ('s["mean_iou"]', SAME),
            'torchmetrics MulticlassJaccardIndex(average="micro")': (
                's["pixel_accuracy"] / (2 - s["pixel_accuracy"])',
                "As SMP's micro.",
            ),
            "torchmetrics segmentation.MeanIoU()": (
                'np.nanmean(each["iou"])',
                "Averages over images.",
            ),
        },
    ),
    "Frequency-weighted IoU": (
        's["frequency_weighted_iou"]',
        {
            "FCN score.py, fwavacc": ('s["frequency_weighted_iou"]', SAME),
            'torchmetrics MulticlassJaccardIndex(average="weighted")': (
                's["frequency_weighted_iou"]',
                SAME,
            ),
        },
    ),
    "Dice per class": (
        's["dice"]',
        {
            'MONAI DiceMetric(reduction="mean_batch")': (
                'np.nan_to_num([metrics.mean(image) for image in labeled("dice").T])',
                "As MeanIoU; 0 if no image has the class.",
            ),
            'MONAI DiceMetric(reduction="mean_batch", ignore_empty=False)': (
                'np.nan_to_num(each["dice"], nan=1).mean(axis=0)',
                "Averages over images. A class that is nowhere in an image counts as 1.",
            ),
            "torchmetrics segmentation.GeneralizedDiceScore(per_class=True)": (
                'np.nan_to_num(each["dice"]).mean(axis=0)',
                "Averages over images. A class that is nowhere in an image counts as 0.",
            ),
        },
    ),
    "Mean Dice": (
        's["mean_dice"]',
        {
            "MONAI DiceMetric()": (
                'np.nanmean(labeled("dice"), axis=1).mean()',
                "Averages over the images that have the class: false positives elsewhere are free.",
            ),
            "MONAI DiceMetric(ignore_empty=False)": (
                'np.nan_to_num(each["dice"], nan=1).mean()',
                "Averages over images. A class that is nowhere in an image counts as 1.",
            ),
            "torchmetrics segmentation.DiceScore(), macro, global": ('s["mean_dice"]', SAME),
            "torchmetrics segmentation.DiceScore(), macro, samplewise": (
                'each["mean_dice"].mean()',
                "Averages over images.",
            ),
        },
    ),
}

NO_COUNTERPART = {  # reason: peers
    "One fraction over the pixels of all classes together: a rare class hardly counts, and ignored "
    "pixels count as errors.": (
        "MMSegmentation DiceLoss()",
        "MMSegmentation DiceLoss(use_sigmoid=False)",
        "MMSegmentation DiceLoss(use_sigmoid=False, naive_dice=True)",
    ),
    "One fraction whose sums weigh each class by 1 / (true pixels)²; a class that is absent from an "
    "image gets the weight that it has in another image.": (
        "torchmetrics segmentation.GeneralizedDiceScore()",
    ),
}

INTRODUCTION = """# Conformance

These are the numbers of other libraries for one small input, and how to get the same numbers here.
`python -m benchmarks.conformance` writes this page, and `tests/benchmarks/test_conformance.py` checks it.

The input has a formula, so that anyone can repeat it: with n, h, w, c counted from 0 in 2 images of
4 x 5 pixels and 3 classes, the logits are 2 sin(0.7 n + 1.3 h + 0.9 w + 2.1 c) in float32, and the
labels

- **full**: (n + h w + h) mod 3;
- **ign**: as full, but ignored (255) in row 0 of image 0 and in columns 1, 2 of row 3 of image 1;
- **abs**: as full with 0 for 2, so that class 2 is absent;
- **img**: as full with 0 for 1 in image 0, so that class 1 is absent from that image alone.

Rows in bold are our defaults, computed. The others are what the library gave, with
`ignore_index=255` where it has one and otherwise the options shown; an empty cell was not measured,
mostly because the library cannot ignore pixels. *From ours* is Python that gives the same number: a
test holds every cell to 0.00001. In it

- `x` is the pair of logits and labels, `images` the same image by image, `one_vs_rest(x)` the same
  with a pixel of two classes for each pixel and class;
- `valid` is the fraction of pixels that are not ignored;
- `counts` is the confusion matrix (row = truth) of the arg-max, and `s` is `summarize(counts)`;
- `each` holds the same scores of each image, one row per image, and `labeled(name)` is
  `each[name]` with NaN where an image has no true pixel of the class.

Versions: {versions}.
"""

ONE_PREDICTION = """## One prediction, many scores

Two images of 2 x 4 pixels and 3 classes. Row 1 of image 0 is class 1, all else class 0; class 2 is
nowhere. **A** is the perfect prediction, **B** has two false positives of class 1 in image 1, which
has none. A class without a score is nan.
"""

DECODERS = """## Decoders

With the same features and weights, `fpn`, `deeplabv3plus`, `upernet` and `segformer` compute the
logits of SMP's decoders to 0.0001. `python -m benchmarks.parity_decoders` writes SMP's logits, and
`tests/models/test_parity_decoders.py` compares ours. For this comparison, SMP's upsampling and norm
are set to our choices below, and the dilations of both are (1, 2, 3).

| decoder | what differs | SMP | ours |
| --- | --- | --- | --- |
| all four | upsampling of feature maps and scores | Bilinear, in parts with `align_corners=True`; nearest in FPN's top-down path. | `model.upsampling` everywhere. `bilinear` has half-pixel centers. |
| `fpn` | norm | Group norm with 32 groups. | `model.norm`. `group` has at most 8 groups. |
| `fpn`, `deeplabv3plus` | dropout in training | 0.2 and 0.5 in the decoder. | None. `model.dropout` is the encoder's. |
| `deeplabv3plus` | dilations | (12, 24, 36) at any output stride. | The papers': (6, 12, 18) at stride 16 and (12, 24, 36) at stride 8. |
| `deeplabv3plus` | channels of the low-level features | 48. | 3/16 of `model.decoder_channels`: 48 of 256. |
| `segformer` | fused strides | 4, 8, 16 and 32, and stride 2 if the encoder has it. | `model.skips`, by default 4, 8 and 16. |
"""

COMPLAINTS = """## What users of other libraries complain about

Each is a test here, marked with its number.
"""


def golden_input(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the test input of a case: logits float32 [2, h, w, 3] and labels int32 [2, h, w].

    The cases "full", "ign", "abs", "img", "A" and "B" are described in INTRODUCTION and
    ONE_PREDICTION.
    """
    if case in ("A", "B"):
        labels = np.zeros((2, 2, 4), np.int32)
        labels[0, 1] = 1
        predictions = labels.copy()
        if case == "B":
            predictions[1, 0, :2] = 1
        return np.eye(3, dtype=np.float32)[predictions], labels
    n, h, w, c = np.indices((2, 4, 5, 3))
    logits = (2 * np.sin(0.7 * n + 1.3 * h + 0.9 * w + 2.1 * c)).astype(np.float32)
    n, h, w = np.indices((2, 4, 5))
    labels = ((n + h * w + h) % 3).astype(np.int32)
    if case == "ign":
        labels[0, 0, :] = labels[1, 3, 1:3] = IGNORE_LABEL
    elif case == "abs":
        labels[labels == 2] = 0
    elif case == "img":
        labels[0][labels[0] == 1] = 0
    return logits, labels


@functools.cache
def names(case: str) -> dict[str, Any]:
    """Returns {name: value} for the variables that the expressions in TABLES may use."""
    logits, labels = golden_input(case)
    matrices = [
        np.asarray(metrics.confusion_matrix(p, y, 3))
        for p, y in zip(logits.argmax(axis=-1), labels, strict=True)
    ]
    summaries = [metrics.summarize(matrix) for matrix in matrices]
    each = {name: np.array([s[name] for s in summaries]) for name in summaries[0]}
    counts = sum(matrices)
    return {
        **LOSSES,
        "np": np,
        "metrics": metrics,
        "one_vs_rest": one_vs_rest,
        "x": (logits, labels),
        "images": [(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))],
        "valid": np.mean(labels != IGNORE_LABEL),
        "counts": counts,
        "s": metrics.summarize(counts),
        "each": each,
        "labeled": lambda name: np.where(np.isnan(each["accuracy"]), np.nan, each[name]),
    }


def one_vs_rest(x: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Converts (logits, labels) to binary problems, with one pixel per pair of pixel and class."""
    logits, labels = x[0], x[1][..., None]
    target = np.where(labels == IGNORE_LABEL, IGNORE_LABEL, labels == np.arange(3))
    return np.stack([0 * logits, logits], axis=-1).reshape(2, 1, -1, 2), target.reshape(2, 1, -1)


def ours(expression: str, case: str) -> Any:
    """Evaluates an expression from TABLES on the input of a case."""
    return eval(expression, dict(names(case)))


def complaints() -> list[tuple[tuple[int, str], list[str]]]:
    """Returns sorted pairs ((number, complaint), test names) from the comments above tests."""
    tests = collections.defaultdict(list)
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        name, marks = path.relative_to(REPOSITORY).as_posix(), []
        for line in path.read_text().splitlines():
            if mark := re.match(r"# (\d+)\. (.+)", line):
                marks.append((int(mark[1]), mark[2]))
            elif test := re.match(r"def (test_\w+)", line):
                for number_and_complaint in marks:
                    tests[number_and_complaint].append(f"{name}::{test[1]}")
                marks = []
    return sorted(tests.items())


def text(value: Any) -> str:
    """Formats a number, a vector or a matrix."""
    value = np.asarray(value)
    if value.ndim:
        return ("", ", ", "; ")[value.ndim].join(map(text, value))
    return str(value) if value.dtype.kind == "i" else f"{value:.5f}"


def comparison(title: str, cases: Sequence[str]) -> str:
    """Formats one of TABLES as Markdown. Libraries without results for `cases` are left out."""
    default, peers = TABLES[title]
    cells = (f"**{text(ours(default, case))}**" for case in cases)
    rows = [("**ours**", *cells, f"`{default}`", "")]
    for peer, (expression, why) in peers.items():
        theirs = PEERS["values"][peer]
        if not theirs.keys().isdisjoint(cases):
            cells = (text(theirs[case]) if case in theirs else "" for case in cases)
            rows.append((peer, *cells, f"`{expression}`", why))
    return f"### {title}\n\n" + table(
        ("", *cases, "from ours", "why it differs from our default"), rows
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table in which all columns are left-aligned text."""
    return markdown_table([columns, *rows], len(columns)) + "\n"


def page() -> str:
    """Returns the text of docs/conformance.md."""
    tested = (
        (str(number), complaint, "<br>".join(f"`{test}`" for test in tests))
        for (number, complaint), tests in complaints()
    )
    versions = ",\n".join(map(" ".join, PEERS["versions"].items()))
    return "\n".join(
        [
            INTRODUCTION.format(versions=versions),
            "## Losses and scores\n",
            *(comparison(title, CASES) for title in TABLES),
            "### Without counterpart\n",
            table(
                ("theirs", "why"),
                (("<br>".join(peers), why) for why, peers in NO_COUNTERPART.items()),
            ),
            ONE_PREDICTION,
            *(comparison(title, ("A", "B")) for title in ("Mean IoU", "Dice per class")),
            DECODERS,
            COMPLAINTS,
            table(("", "complaint", "tests here"), tested),
        ]
    )


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
