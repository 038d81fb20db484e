"""Scores a trained workdir: python -m dense_jax.evaluate --workdir=DIR [--split=test].

Writes evaluation_SPLIT.json and .md, .npz with the name of each image and what was counted of
it, .zip with the predicted class maps, as PNG files in the classes' colors, and .png with the images
that score worst. Every valid pixel of the split is counted exactly once, at the labels' own resolution;
ignored pixels count nowhere. A class that is neither in the labels nor predicted has no score (null),
is named, and is left out of the means.

Region scores, boundary_iou and trimap_mean_iou/PIXELS are of all pixels of the split together;
boundary_f1, hausdorff95, average_surface_distance, rand_score and information_score are means over
the images that have them, for a contour or an object belongs to one image. mean_over_images/NAME is
the mean of what each image's own NAME is.
"""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from PIL import Image

from dense_jax import command, data, metrics, plots, storage
from dense_jax.data.tiles import tilings
from dense_jax.devices import runtime as startup
from dense_jax.evaluation import class_maps as predictions
from dense_jax.evaluation import per_image, scoring
from dense_jax.metrics import aggregation as tallies
from dense_jax.metrics import boundary
from dense_jax.metrics.aggregation import BOUNDARY, FOREGROUND, MEANS, OBJECTS, REGION
from dense_jax.program import jit_eval_step
from dense_jax.trained import load
from dense_jax.workdir import files as workdir

_LOG = logging.getLogger("dense_jax")
NUM_DRAWN = 6  # of the worst images
SPELLINGS = {
    "dice": "Dice",
    "mean_dice": "mean Dice",
    "boundary_f1": "boundary F1",
    "hausdorff95": "Hausdorff 95",
    "rand_score": "Rand score",
}


def evaluate(
    directory: str,
    split: str | None = None,
    checkpoint: str = "best",
    *,
    batch_size: int | None = None,
    tile_size: Sequence[int] | None = None,
    margin: int | None = None,
    boundaries: bool = True,
    foreground: Sequence[str] = (),
    root: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Scores one split with one checkpoint; writes and returns evaluation_SPLIT.json.

    What is None is as in the run: its eval_split, and eval.batch_size in tiles per step,
    eval.tile_size and eval.margin in pixels. The scores do not depend on the batch size.

    boundaries: whether to measure boundaries, which needs whole class maps on the host.
    foreground: classes to be scored as one against all others, and whose connected components are
      told apart by the Rand and information scores.
    root: the folder of the data, where they are no longer in the run's data.root, or are others.
    output: the folder that the files go to; by default the workdir.
    """
    loaded = load(directory, checkpoint)
    config = loaded.config
    split = split or config.data.eval_split
    path = epath.Path(output or directory) / f"evaluation_{split}.json"
    _check_writable(path.parent)
    if root is None and not epath.Path(config.data.root).is_dir():
        raise ValueError(f"{config.data.root} is gone: pass --root=FOLDER, where the data are now")
    moved = root is not None
    root = workdir.absolute(config.data.root if root is None else root)
    source = data.open_dataset(config.data.name, root, split)
    facts = {"class_names": source.class_names, "num_channels": source.num_channels}
    if not moved:  # other files may store the same in another way
        facts |= {"values": source.values, "value_range": source.value_range}
    for field, there in storage.to_json(facts).items():
        if there != loaded.dataset[field]:
            raise ValueError(
                f"{root or config.data.name} has {field} {there}, but the run was "
                f"trained with {loaded.dataset[field]}"
            )
    with contextlib.suppress(ValueError):  # what is damaged may be replaced
        before = workdir.read_json(path) if path.exists() else {}
        if before.get("dataset_fingerprint", source.fingerprint) != source.fingerprint:
            _LOG.warning("%s was of other data, %s, and is replaced", path, before.get("root"))
    if unknown := sorted(set(foreground) - set(source.class_names)):
        raise ValueError(
            f"foreground has no classes {unknown}; there are: {', '.join(source.class_names)}"
        )
    foreground = list(dict.fromkeys(foreground))  # a class named twice is counted once
    classes = [source.class_names.index(name) for name in foreground]
    tiles = tilings(
        source,
        loaded.dataset["image_size"],
        tile_size or config.eval.tile_size,
        config.eval.margin if margin is None else margin,
        loaded.program.context,
    )
    eval_step = jit_eval_step(loaded.program, loaded.mesh)
    with contextlib.ExitStack() as stack:
        pool = per_image.Pool(source.num_classes, classes) if boundaries else None
        write = None
        if pool:
            stack.callback(pool.close)
        if jax.process_index() == 0:
            written = predictions.writing(
                path.with_suffix(".zip"), source.names, plots.palette_of(source)
            )
            write = stack.enter_context(written)

        def receive(i: int, prediction: np.ndarray, label: np.ndarray) -> None:
            if pool:
                pool.submit(i, prediction, label)
            if write:
                write(i, prediction)

        matrices = scoring.score(
            eval_step,
            loaded.variables,
            tiles,
            mesh=loaded.mesh,
            receive=receive if pool or write else None,
            batch_size=config.eval.batch_size if batch_size is None else batch_size,
            workers=config.data.workers,
        )
        counted = {"confusion_matrices": matrices} | (pool.results() if pool else {})
        if jax.process_index() == 0:
            path.unlink(missing_ok=True)  # written last: where it is, all files are
    of_images = tallies.tally(counted, classes)
    scores, low, high = (
        metrics.named_scores(each, source.class_names)
        for each in (
            tallies.score(tallies.total(of_images)),
            *metrics.bootstrap(of_images, tallies.score),
        )
    )
    true, guessed = matrices.any(axis=2), matrices.any(axis=1)  # [n, c]: shown by the image
    nowhere = ~np.any(true | guessed, axis=0)
    evaluation = {
        "dataset": config.data.name,
        "root": root,
        "dataset_fingerprint": source.fingerprint,
        "split": split,
        "step": loaded.step,
        "num_images": len(source),
        "num_pixels": matrices.sum(dtype=np.int64).item(),
        "resolution": "the labels' own",
        "metric_convention": metrics.CONVENTION,
        "tile_size": [each.tile_size for each in tiles],
        "margin": [each.margin for each in tiles],
        "class_names": source.class_names,
        "classes_without_score": [source.class_names[c] for c in np.flatnonzero(nowhere)],
        "foreground": foreground,
        **scores,
        "intervals_are": "95 %, over images, by 1000 bootstrap resamples",
        "intervals": {name: (low[name], high[name]) for name in low},
        "num_images_missed": np.sum(true & ~guessed, axis=0),
        "num_images_invented": np.sum(guessed & ~true, axis=0),
        "confusion_matrix": matrices.sum(axis=0, dtype=np.int64),
    }
    if jax.process_index() == 0:
        path.with_suffix(".md").write_text(markdown(evaluation))
        of_each = metrics.mean_iou_of_each(matrices)
        worst = np.argsort(of_each)[:NUM_DRAWN].tolist()  # without a score: last
        picture = predictions.draw(path.with_suffix(".zip"), source, worst, of_each)
        with path.with_suffix(".png").open("wb") as file:
            Image.fromarray(picture).save(file, "PNG")
        with path.with_suffix(".npz").open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, names=np.array(source.names), **counted)
        storage.write_json(path, evaluation)
    return evaluation


def _check_writable(folder: epath.Path) -> None:
    """Raises ValueError if the evaluation cannot be written to a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.tmp").write_text("")
        (folder / "evaluation.tmp").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder} ({error.strerror}): name another folder with --output=DIR"
        ) from error


def markdown(evaluation: Mapping[str, Any]) -> str:
    """Tables of the means and of each class."""

    def value(name: str, number: float) -> str:
        if np.isnan(number):
            return "no score"
        in_pixels = "hausdorff95" in name or "distance" in name
        return f"{number:.2f}" if in_pixels else f"{100 * number:.2f}"

    def cell(name: str) -> str:
        number = evaluation.get(f"eval/{name}")
        if number is None:
            return ""
        ends = [value(name, end) for end in evaluation["intervals"][f"eval/{name}"]]
        interval = "" if np.isnan(number) or "no score" in ends else f" ({' to '.join(ends)})"
        return value(name, number) + interval

    def table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
        cells = [["", *columns], ["---", *["---:"] * len(columns)]]
        cells += [[" ".join(name.replace("|", "\\|").split()), *row] for name, row in rows.items()]
        return [*(f"| {' | '.join(row)} |" for row in cells), ""]

    def words(*names: str) -> list[str]:
        return [SPELLINGS.get(name, name).replace("_", " ").replace("iou", "IoU") for name in names]

    classes = evaluation["class_names"]
    measured = [name for name in BOUNDARY if f"eval/mean_{name}" in evaluation]
    about = (
        f"{evaluation['num_images']} images, {evaluation['num_pixels']:,} valid pixels, at the "
        "labels' own resolution, in percent, with 95 % intervals over images (bootstrap). Ignored "
        "pixels count nowhere. The mean over images is of each image's own score, another measure."
    )
    name = f"{evaluation['dataset']} {evaluation['root']}".rstrip()
    lines = [f"# {name}, {evaluation['split']}, step {evaluation['step']}", "", about]
    if without := evaluation["classes_without_score"]:
        lines += ["", f"In no label and never predicted, so in no mean: {', '.join(without)}."]
    lines.append("")
    lines += table(
        words(*MEANS),
        {
            "all pixels": [cell(name) for name in MEANS],
            "mean over images": [cell(f"mean_over_images/{name}") for name in MEANS],
        },
    )
    lines += table(words(*REGION), {c: [cell(f"{name}/{c}") for name in REGION] for c in classes})
    if measured:
        missed, invented = evaluation["num_images_missed"], evaluation["num_images_invented"]
        about = (
            "Boundaries: F1 within 0.75 % of the diagonal, IoU of the rims of 2 % of it; 95th "
            "percentile and mean of the distances in pixels. F1 and distances are means over the "
            "images that show the class on either side; where one side alone does (missed: in the "
            "label; invented: in the prediction), F1 is 0 and the distances are the diagonal. IoU is "
            "of all images' rims together."
        )
        lines += [about, ""]
        lines += table(
            [*words(*measured), "images missed", "invented"],
            {
                "mean": [*(cell(f"mean_{name}") for name in measured), "", ""],
                **{
                    c: [*(cell(f"{name}/{c}") for name in measured), str(m), str(i)]
                    for c, m, i in zip(classes, missed, invented, strict=True)
                },
            },
        )
        bf = cell("mean_over_images/mean_boundary_f1")
        lines += [
            f"Boundary F1, the mean over images of the label's classes (SegNet's BF): {bf}",
            "",
        ]
        lines += table(
            [f"{width} px" for width in boundary.BAND_WIDTHS],
            {
                "mean IoU this close to the label's boundaries": [
                    cell(f"trimap_mean_iou/{width}") for width in boundary.BAND_WIDTHS
                ]
            },
        )
    if evaluation["foreground"]:
        objects = [name for name in OBJECTS if f"eval/{name}" in evaluation]
        about = (
            f"Foreground: {', '.join(evaluation['foreground'])}, against all others. Its connected "
            "components are the objects of the Rand and information scores, in images that have any."
        )
        lines += [about, ""]
        lines += table(
            words(*FOREGROUND, *objects),
            {
                "all pixels": [
                    *(cell(f"foreground_{name}") for name in FOREGROUND),
                    *[""] * len(objects),
                ],
                "mean over images": [
                    *(cell(f"mean_over_images/foreground_{name}") for name in FOREGROUND),
                    *map(cell, objects),
                ],
            },
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Evaluates, every seed where there are several, and prints the tables."""
    startup.prepare()
    args = flags.FLAGS
    for path in workdir.runs(args.workdir):
        evaluation = evaluate(
            str(path),
            args.split,
            args.checkpoint,
            batch_size=args.batch_size,
            tile_size=args.tile_size,
            margin=args.margin,
            boundaries=args.boundaries,
            foreground=args.foreground,
            root=args.root,
            output=args.output and str(epath.Path(args.output) / path.relative_to(args.workdir)),
        )
        print(markdown(evaluation))


if __name__ == "__main__":
    command.define_folder("workdir", "Of a run of dense_jax.main.", required=True)
    command.define_folder("root", "Folder of the data; by default the run's data.root.")
    command.define_folder("output", "Folder that the files go to; by default the workdir.")
    flags.DEFINE_string("split", None, "Which to score; by default the run's eval_split.")
    flags.DEFINE_string("checkpoint", "best", "best (by eval/mean_iou), latest or STEP.")
    flags.DEFINE_integer("batch_size", None, "Tiles per step; by default the run's.", lower_bound=1)
    command.define_size("tile_size", None, "HEIGHT,WIDTH in pixels; by default the run's.")
    flags.DEFINE_integer("margin", None, "Context in pixels; by default the run's.", lower_bound=0)
    flags.DEFINE_bool("boundaries", True, "Whether to measure boundaries, too.")
    flags.DEFINE_list("foreground", [], "CLASS,... to score as one, and as objects, too.")
    command.run(main)
