"""Scores the trained model in a workdir: python -m dense_jax.evaluate --workdir=DIR [--split=test].

Writes these files to the workdir or --output, where SPLIT is the name of the scored split:

  evaluation_SPLIT.json, .md  the scores
  evaluation_SPLIT.npz        the name, confusion matrix and other measurements of each image
  evaluation_SPLIT.zip        the predicted class maps as PNGs in the class colors
  evaluation_SPLIT.png        the images with the lowest mean IoU
  evaluation_SPLIT_reliability.png  how often the network is right, by how sure it is
  calibration.json            with --calibrate, the temperature of the checkpoint, and the
                              thresholds of regions

With several workdirs, such as those of the seeds of a run, they are scored as an ensemble: the
class probabilities are the mean of the networks'. The files then go to --output, and also tell what
the ensemble gains over its networks.

The held-out fold of a run with config.data.folds is the split "fold".

Every valid pixel of the split is counted exactly once, at the labels' original resolution. Ignored
pixels are not counted. A class that appears in neither the labels nor the predictions gets a null
score and is excluded from the means.

The scores boundary_f1, hausdorff95, average_surface_distance, rand_score and information_score are
computed for each image and averaged over the images for which they are defined. All other scores,
such as mean_iou, are computed over all pixels of the split at once. The JSON file also has averages
of per-image scores, such as mean_over_images/mean_iou.

The temperature is chosen on the split that was evaluated in training, whatever split is scored.

If the network learns regions, they take the place of the classes. The files show the last region
of each pixel, in the order of dataset.json, and predictions at the threshold 0.5.
"""

from absl import flags

from dense_jax import command

if __name__ == "__main__":  # above the slow imports, so that --help answers at once
    command.define_workdirs("Workdir of a run of dense_jax.main, or several: an ensemble.")
    command.define_folder(
        "root", "Folder of the data; by default the run's data.root.", bucket="data"
    )
    command.define_folder(
        "output", "Folder to write the files to; by default the workdir.", bucket="output"
    )
    flags.DEFINE_string(
        "split", None, "The split to score; by default the run's eval_split or fold."
    )
    flags.DEFINE_string("checkpoint", "best", "best (by eval/mean_iou), latest or STEP.")
    flags.DEFINE_integer("batch_size", None, "Tiles per step; by default the run's.", lower_bound=1)
    command.define_size("tile_size", None, "HEIGHT,WIDTH in pixels; by default the run's.")
    flags.DEFINE_integer(
        "margin", None, "Margin of tiles in pixels; by default the run's.", lower_bound=0
    )
    flags.DEFINE_bool("boundaries", True, "Whether to add boundary scores.")
    flags.DEFINE_bool(
        "calibrate",
        False,
        "Whether to choose a temperature, and thresholds of regions, and to score with them.",
    )
    flags.DEFINE_list("foreground", [], "CLASS,... to score as one merged class and as objects.")
    command.help_if_asked()

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from dense_jax import buckets, class_colors, data, metrics, regions, storage
from dense_jax.data import folds, levels, tiles
from dense_jax.devices import runtime
from dense_jax.evaluation import (
    baselines,
    calibration,
    class_maps,
    per_image,
    reliability,
    scoring,
    tables,
)
from dense_jax.evaluation.worst import NUM_DRAWN
from dense_jax.metrics import aggregation
from dense_jax.metrics.calibration import TEMPERATURES, best_thresholds
from dense_jax.program import jit_eval_step, normalization
from dense_jax.trained import Trained, load
from dense_jax.workdir import files

_LOG = logging.getLogger("dense_jax")
# Flags that are passed to `evaluate` unchanged.
OPTIONS = (
    "split",
    "checkpoint",
    "batch_size",
    "tile_size",
    "margin",
    "boundaries",
    "calibrate",
    "foreground",
    "root",
)


def evaluate(
    directory: str | Sequence[str],
    split: str | None = None,
    checkpoint: str = "best",
    *,
    batch_size: int | None = None,
    tile_size: Sequence[int] | None = None,
    margin: int | None = None,
    boundaries: bool = True,
    calibrate: bool = False,
    foreground: Sequence[str] = (),
    root: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Scores a checkpoint on a split, writes all files, and returns the JSON file's contents.

    directory: A workdir, or the workdirs of an ensemble.
    split: The split to score, or "fold", the run's held-out fold. If None, the one that was
      evaluated in training.
    batch_size: The number of tiles per step, which does not affect the scores. If None, the
      config's eval.batch_size.
    tile_size, margin: The tiles' size and margin, in pixels. If None, the config's eval.tile_size
      and eval.margin.
    boundaries: Whether to compute the boundary scores.
    calibrate: Whether to choose a temperature on the split that was evaluated in training, write
      it to calibration.json, and also score the probabilities with it. With regions, it also
      chooses a threshold for each, and scores what is predicted with them.
    foreground: The classes to merge into one class, which is scored against all other classes.
      Connected components of the merged class are the objects in the Rand and information scores.
    root: The data folder, if the data was moved or replaced. If None, the config's data.root.
    output: The output folder, needed for an ensemble. If None, the workdir.
    """
    directories = [directory] if isinstance(directory, str) else list(directory)
    if len(directories) > 1 and not output:
        raise ValueError("several workdirs are an ensemble: name a folder for it with --output=DIR")
    run = load(directories, checkpoint)
    config, num_networks = run.config, len(directories)
    chosen_on = folds.eval_split(config.data)
    split = split or chosen_on
    if num_networks > 1 and folds.FOLD in ([split, chosen_on] if calibrate else [split]):
        raise ValueError(
            "the networks of an ensemble may have been trained on the held-out fold of the first: "
            "pass another --split, without --calibrate"
        )
    path = epath.Path(output or directories[0]) / f"evaluation_{split}.json"
    _check_writable(path.parent)
    folder, source, levels_of = _open(run, root, split)
    _warn_of_other_data(path, source)
    if unknown := sorted(set(foreground) - set(source.class_names)):
        raise ValueError(
            f"foreground has no classes {unknown}; there are: {', '.join(source.class_names)}"
        )
    if foreground and source.regions:
        raise ValueError(
            "--foreground merges classes, but this network learns regions: declare the merged class "
            'in "regions" of dataset.json'
        )
    foreground = list(dict.fromkeys(foreground))  # a class named twice is counted once
    cut = functools.partial(
        tiles.tilings,
        ladder=run.dataset["ladder"],
        tile_size=tile_size or config.eval.tile_size,
        margin=config.eval.margin if margin is None else margin,
        context=run.program.context,
    )
    tilings = cut(levels.with_levels(source, levels_of))
    classes = [source.class_names.index(name) for name in foreground]
    score = functools.partial(
        scoring.score,
        mesh=run.mesh,
        batch_size=batch_size or config.eval.batch_size,
        workers=config.data.workers,
    )
    fitted = None
    if calibrate:
        other, of_other = source, levels_of
        if chosen_on != split:
            _, other, of_other = _open(run, root, chosen_on)
        fitted = _fit(run, score, cut(levels.with_levels(other, of_other)))
        fitted |= {"split": chosen_on, "dataset_fingerprint": other.fingerprint}
        if jax.process_index() == 0:
            storage.write_json(path.parent / "calibration.json", fitted)
    measured = _measure(run, source, score, tilings, path, classes, boundaries, fitted)
    counts = measured["confusion_matrices"].sum(axis=0, dtype=np.int64)
    evaluation = {
        "dataset": config.data.name,
        "root": folder,
        "dataset_fingerprint": source.fingerprint,
        "split": split,
        "step": run.step,
        "calibration": fitted,
        "num_images": len(source),
        "num_pixels": int(metrics.pixel_counts(counts, counts.ndim == 3).total),
        "resolution": "the labels' own",
        "metric_convention": metrics.CONVENTION,
        "tile_size": [tiling.tile_size for tiling in tilings],
        "margin": [tiling.margin for tiling in tilings],
        "class_names": source.output_names,
        "regions": regions.declaration(source),
        "foreground": foreground,
        **_scores(measured, source.output_names, classes),
        **baselines.compare(counts, source.class_names, baselines.gray_histogram(source)),
        "confusion_matrix": counts,
    }
    if num_networks > 1:
        networks = zip(directories, run.steps, strict=True)
        evaluation["networks"] = [{"workdir": name, "step": step} for name, step in networks]
        evaluation["gains"] = calibration.gains(measured, num_networks, tables.GAINS)
    if jax.process_index() == 0:
        _write(path, source, evaluation, measured)
    return evaluation


def _check_writable(folder: epath.Path) -> None:
    """Creates `folder` if needed. Raises ValueError if files cannot be written to `folder`."""
    if buckets.is_url(folder):
        buckets.check(str(folder), "output")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.tmp").write_text("")
        (folder / "evaluation.tmp").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder} ({error.strerror}): name another folder with --output=DIR"
        ) from error


def _open(
    run: Trained, root: str | None, split: str
) -> tuple[str, data.Source, levels.Rule | None]:
    """Returns the data's folder, its source, and how the levels of its images are found.

    Raises ValueError if the data does not fit the run.
    """
    config, name = run.config.data, normalization(run.config.model)
    facts = ("class_names", "num_channels", "regions")
    if root is None or name == "dataset":  # else data in another folder may hold other values
        facts += ("dtype", "values", "value_range")
    is_here = buckets.is_url(config.root) or epath.Path(config.root).is_dir()
    if root is None and not is_here:
        raise ValueError(f"{config.root} is gone: pass --root=FOLDER, where the data is now")
    folder = files.absolute(config.root if root is None else root)
    source = folds.open_split(config, split, folder)
    for field in facts:
        value, expected = getattr(source, field), run.dataset.get(field)
        if field == "regions":
            declared = regions.declaration(source)
            value, expected = regions.in_order(declared), regions.in_order(expected)
        if (value := storage.to_json(value)) != storage.to_json(expected):
            raise ValueError(
                f"{folder or config.name} has {field} {value}, but the run was trained with "
                f"{expected}"
            )
    values = {field: getattr(source, field) for field in ("num_channels", "dtype", "value_range")}
    return folder, source, levels.rule(name, {**run.dataset, **values})


def _warn_of_other_data(path: epath.Path, source: Any) -> None:
    """Warns if the evaluation will overwrite an earlier evaluation on different data."""
    with contextlib.suppress(ValueError):  # no warning if the earlier file is corrupted
        before = files.read_json(path) if path.exists() else {}
        if before.get("dataset_fingerprint", source.fingerprint) != source.fingerprint:
            _LOG.warning("%s was of other data, %s, and is replaced", path, before.get("root"))


def _fit(run: Trained, score: Callable, tilings: Sequence[tiles.Tiles]) -> dict[str, Any]:
    """Returns the content of calibration.json, but for the facts about the data."""
    step = _jit(run, calibration.nll_step)
    temperature, interval = calibration.fit(score(step, run.variables, tilings)["nll"])
    thresholds = None
    if run.program.regions:
        step, variables = _jit(run, calibration.threshold_step), np.float32(temperature)
        counts = score(step, (run.variables, variables), tilings, per_image=False)["counts"]
        thresholds = dict(zip(run.program.regions.names, best_thresholds(counts), strict=True))
    lowest, *_, highest = TEMPERATURES
    if temperature in (lowest, highest):
        _LOG.warning(
            "the temperature is %g, the %s that is tried: these probabilities say little",
            *(temperature, "lowest" if temperature == lowest else "highest"),
        )
    return {
        "temperature": temperature,
        "interval": interval,
        "interval_is": "95 %, over images, by 1000 bootstrap resamples",
        "thresholds": thresholds,
        "steps": run.steps,
        "fingerprint": run.fingerprint,
    }


def _jit(run: Trained, step: Callable) -> Any:
    """Returns a step of `calibration`, for the network of a run."""
    bound = functools.partial(
        step,
        logits_step=run.program.logits_step,
        num_networks=len(run.steps),
        regions=run.program.regions,
    )
    return jit_eval_step(run.program._replace(eval_step=bound), run.mesh)


def _measure(
    run: Trained,
    source: data.Source,
    score: Callable,
    tilings: Sequence[tiles.Tiles],
    path: epath.Path,
    foreground: Sequence[int],
    boundaries: bool,
    fitted: Mapping[str, Any] | None,
) -> dict[str, np.ndarray]:
    """Predicts and measures all images of the split, and writes their class maps.

    Returns the results of `calibration.by_lane` and, if `boundaries`, those of `per_image.Pool`.
    """
    step = _jit(run, calibration.eval_step)
    corrections = None
    if fitted:
        thresholds = np.array(list((fitted["thresholds"] or {}).values()), np.float32)
        corrections = np.float32(fitted["temperature"]), thresholds
    receivers: list[Callable[..., object]] = []
    with contextlib.ExitStack() as stack:
        pool = per_image.Pool(source.num_classes, foreground) if boundaries else None
        if pool:
            stack.callback(pool.close)
            targets = source.regions.masks if source.regions else np.asarray
            receivers.append(
                lambda i, prediction, label: pool.submit(i, prediction, targets(label))
            )
        if jax.process_index() == 0:
            add = stack.enter_context(
                class_maps.writing(
                    path.with_suffix(".zip"),
                    source.names,
                    class_colors.to_palette(class_colors.prediction_colors(source)),
                )
            )
            receivers.append(
                lambda i, prediction, label: add(i, regions.flat(prediction, source.regions))
            )

        sums = score(
            step,
            (run.variables, corrections),
            tilings,
            receive=(lambda *image: [f(*image) for f in receivers]) if receivers else None,
        )
        names = calibration.lanes(len(run.steps), is_calibrated=fitted is not None)
        measured = calibration.by_lane(sums, names) | (pool.results() if pool else {})
        if jax.process_index() == 0:
            path.unlink(missing_ok=True)  # the JSON file exists only if all files are complete
    return measured


def _scores(
    measured: Mapping[str, np.ndarray], class_names: Sequence[str], foreground: Sequence[int]
) -> dict[str, Any]:
    """Returns the part of the JSON file that contains the scores.

    A class is counted as missed in an image if only the label contains it, and as invented if only
    the prediction contains it.
    """
    statistics = aggregation.image_statistics(measured, foreground)
    scores, low, high = (
        metrics.named_scores(scores, class_names)
        for scores in (
            aggregation.score(aggregation.add_up(statistics)),
            *aggregation.bootstrap(statistics),
        )
    )
    matrices = measured["confusion_matrices"]
    counts = metrics.pixel_counts(matrices, matrices.ndim == 4)
    true, guessed = counts.true > 0, counts.predicted > 0  # [n, c]: the image has the class
    somewhere = np.any(true | guessed, axis=0)
    return {
        "classes_without_score": [
            name for name, shown in zip(class_names, somewhere, strict=True) if not shown
        ],
        **scores,
        "intervals_are": "95 %, over images, by 1000 bootstrap resamples",
        "intervals": {name: (low[name], high[name]) for name in low},
        "num_images_missed": np.sum(true & ~guessed, axis=0),
        "num_images_invented": np.sum(guessed & ~true, axis=0),
    }


def _write(
    path: epath.Path,
    source: Any,
    evaluation: Mapping[str, Any],
    measured: Mapping[str, np.ndarray],
) -> None:
    """Writes the output files except the class maps. Writes the JSON file last."""
    storage.write_text(path.with_suffix(".md"), tables.to_markdown(evaluation))
    scores = metrics.image_mean_ious(measured["confusion_matrices"])
    worst = np.argsort(scores)[:NUM_DRAWN].tolist()  # images without a score come last
    picture = class_maps.draw(path.with_suffix(".zip"), source, worst, scores)
    with storage.atomic(path.with_suffix(".png")) as file:
        Image.fromarray(picture).save(file, "PNG")
    histograms = {
        line: measured[f"{lane}reliability"].sum(axis=0)
        for lane, line in (("", "as trained"), (calibration.CALIBRATED, "with the temperature"))
        if f"{lane}reliability" in measured
    }
    with storage.atomic(path.with_name(f"{path.stem}_reliability.png")) as file:
        reliability.draw(file, histograms)
    with storage.atomic(path.with_suffix(".npz")) as file:
        np.savez_compressed(file, allow_pickle=False, names=np.array(source.names), **measured)
    storage.write_json(path, evaluation)


def main(argv: list[str]) -> None:
    """Evaluates all runs in the workdir (one per seed) and prints the tables."""
    runtime.prepare()
    args = flags.FLAGS
    options = {name: getattr(args, name) for name in OPTIONS}
    if len(args.workdir) > 1:
        print(tables.to_markdown(evaluate(args.workdir, output=args.output, **options)))
        return
    (workdir,) = args.workdir
    for path in files.runs(workdir):
        output = args.output and str(epath.Path(args.output) / path.relative_to(workdir))
        print(tables.to_markdown(evaluate(str(path), output=output, **options)))


if __name__ == "__main__":
    command.run(main)
