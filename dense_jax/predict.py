"""Segments image files of any size.

python -m dense_jax.predict --workdir=DIR --images='GLOB' --output=OUT

Writes OUT/NAME.png, the class ids as palette indices at the image's own size, OUT/NAME_overlay.png
and, once, OUT/legend.png, the classes' colors; where asked for, OUT/NAME_probabilities.npz or .tif, the classes'
probabilities as float16 [h, w, k], and OUT/NAME_uncertainty.png, their entropy in gray. Of a file of
several pages, each is an image called NAME_page000, NAME_page001, ...

Images are read, computed and written by rows of tiles: memory does not depend on their heights.
Of an image that cannot be read or written, no result is left; the others are done, and the exit
status is 1. A full disk ends the command.
"""

import itertools
import os
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from absl import flags

from dense_jax import command, plots
from dense_jax.devices import runtime as startup
from dense_jax.inference import image_files, tta
from dense_jax.inference import threads as background
from dense_jax.inference import writers as results
from dense_jax.inference.predictor import Predictor, Strip, entropy, load
from dense_jax.inference.stitching import Failure

NUM_LANES = 4  # threads that compress results
# Beside classes and overlay, of probabilities [n, m, num_classes].
MAPS = {"probabilities": lambda block: block.astype(np.float16), "uncertainty": entropy}


def predict(
    directory: str,
    images: str | Sequence[str],
    output: str | Path,
    checkpoint: str = "best",
    *,
    overwrite: bool = False,
    opacity: float = plots.OPACITY,
    probabilities: str | None = None,
    uncertainty: bool = False,
    max_megapixels: float = 1000,
    **using: Any,
) -> list[str]:
    """Segments images; returns what was wrong with those left out.

    images: one or several of what `image_files` understands.
    opacity: of the classes' colors over the image, 0 to 1.
    probabilities: "npz", "tif" or None.
    max_megapixels: of an image; a larger one is left out.
    using: as of `Predictor.using`.

    Raises ValueError, before anything is written, if an argument stands for no file, if two images
    would have the same result, or if a result is there already and may not be overwritten.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is a file: it must be a folder")
    paths = image_files.find([images] if isinstance(images, str) else images, output)
    endings = {"classes": ".png", "overlay": "_overlay.png"}
    if probabilities:
        endings["probabilities"] = f"_probabilities.{probabilities}"
    if uncertainty:
        endings["uncertainty"] = "_uncertainty.png"
    found, problems = image_files.headers(paths, 1e6 * max_megapixels)
    legend = output / "legend.png"
    _check(
        [output / (image.name + end) for image in found for end in endings.values()],
        legend,
        overwrite,
        {os.path.realpath(path) for path in paths},
    )
    predictor = load(directory, checkpoint).using(**using)
    output.mkdir(parents=True, exist_ok=True)
    if overwrite or not legend.exists():
        colors = plots.colors_of(predictor.class_names, predictor.palette)
        with results.naming(legend):
            PIL.Image.fromarray(plots.legend(colors)).save(legend)
    if found:
        problems += _write(predictor, found, output, endings, opacity)
    return problems


def _check(paths: Sequence[Path], legend: Path, overwrite: bool, images: Collection[str]) -> None:
    counts = Counter([*paths, legend])  # which may be there from an earlier call
    if twice := sorted(path.name for path, count in counts.items() if count > 1):
        raise ValueError(f"several images would be written to {twice}: rename them")
    there = [path for path in paths if os.path.exists(path)]  # False where a name is too long
    if folders := [path for path in there if path.is_dir()]:
        raise ValueError(f"{folders[0]} is a folder, where a result would be: move it away")
    if images_too := [path for path in there if os.path.realpath(path) in images]:
        raise ValueError(f"{images_too[0]} is one of --images: pass another --output")
    if there and not overwrite:
        raise ValueError(f"{there[0]} exists ({len(there)} results do): pass --overwrite")


def _write(
    predictor: Predictor,
    images: Sequence[image_files.Image],
    output: Path,
    endings: Mapping[str, str],
    opacity: float,
) -> list[str]:
    """Segments images and writes the results; returns what was wrong with those left out."""
    source = image_files.ImageFiles(images, predictor.num_channels, predictor.value_range)

    def file_of(kind: str, path: Path, size: tuple[int, int]) -> results.Rows:
        if kind == "probabilities":
            array = results.Npz if path.suffix == ".npz" else results.Tiff
            return array(path, (*size, len(predictor.class_names)))
        palette = predictor.palette if kind == "classes" else None
        return results.Png(path, size, rgb=kind == "overlay", palette=palette)

    def write(kind: str, file: Any, strip: Strip, height: int) -> None:
        if strip.start == 0:
            file.start()
        if kind == "overlay":
            rows = max(1, 2**20 // strip.image.shape[1])  # of its mixture, a channel takes 8 bytes
            for y in range(0, len(strip.image), rows):
                image, classes = (x[y : y + rows] for x in (strip.image, strip.maps["classes"]))
                file.write(plots.overlay(image, classes, predictor.palette, opacity))
        else:
            file.write(strip.maps[kind])
        if strip.stop == height:
            file.finish()

    def close(written: results.Together, calls: Sequence[Future]) -> None:
        for call in calls:
            call.result()
        written.end()
        unfinished.discard(written)
        if written.problem:
            problems.append(written.problem)

    maps = {kind: make for kind, make in MAPS.items() if kind in endings}
    problems: list[str] = []
    lanes = itertools.count()
    files: list[tuple[int, str, results.Rows]] = []  # of the image at hand
    calls: list[Future] = []  # of its latest strip
    written = results.Together([])
    unfinished: set[results.Together] = set()  # of this and earlier ones
    try:
        with background.lanes(NUM_LANES) as submit:
            for strip in predictor.segment(source, maps):
                image = images[strip.index]
                if not files:
                    files = [
                        (next(lanes), kind, file_of(kind, output / (image.name + end), image.size))
                        for kind, end in endings.items()
                    ]
                    calls = []
                    written = results.Together([file for *_, file in files])
                    unfinished.add(written)
                if isinstance(strip, Failure):
                    written.problem = str(strip.problem)
                else:
                    calls = [
                        submit(lane, written.attempt, file, write, kind, file, strip, image.size[0])
                        for lane, kind, file in files
                    ]
                if isinstance(strip, Failure) or strip.stop == image.size[0]:
                    submit(next(lanes), close, written, calls)
                    files = []
    finally:
        for each in unfinished:
            each.remove()
    return problems


def main(argv: list[str]) -> None:
    """Predicts and says what could not be read."""
    startup.prepare()
    args = flags.FLAGS
    problems = predict(
        args.workdir,
        list(map(os.path.expanduser, args.images)),
        args.output,
        args.checkpoint,
        overwrite=args.overwrite,
        opacity=args.opacity,
        probabilities=args.probabilities,
        uncertainty=args.uncertainty,
        max_megapixels=args.max_megapixels,
        tile_size=args.tile_size,
        margin=args.margin,
        batch_size=args.batch_size,
        blend=args.blend,
        augment=args.augment,
    )
    print(f"results are in {args.output}")
    if problems:
        sys.exit("\n".join([*problems, f"{len(problems)} images were left out"]))


if __name__ == "__main__":
    command.define_path(
        "workdir", "Of a run of dense_jax.main, or a file of dense_jax.export.", required=True
    )
    flags.DEFINE_list(
        "images",
        None,
        "Files, folders and globs, separated by commas; quote globs, and put double quotes around "
        "what has a comma in it.",
        required=True,
    )
    command.define_folder("output", "Folder for the results.", required=True)
    flags.DEFINE_string("checkpoint", "best", "best (by eval/mean_iou), latest or STEP.")
    flags.DEFINE_bool("overwrite", False, "Replace results that are there already.")
    flags.DEFINE_float(
        "opacity", plots.OPACITY, "Of the colors in the overlay.", lower_bound=0, upper_bound=1
    )
    flags.DEFINE_enum("probabilities", None, ["npz", "tif"], "Write the classes' probabilities.")
    flags.DEFINE_bool("uncertainty", False, "Write the entropy of the probabilities.")
    flags.DEFINE_bool("blend", False, "Let tiles overlap by their margins, and blend them there.")
    flags.DEFINE_list(
        "augment", [], f"Predict changed copies, too: {', '.join(tta.AUGMENTATIONS)}."
    )
    flags.DEFINE_integer("batch_size", None, "Tiles per step; by default the run's.", lower_bound=1)
    command.define_size("tile_size", None, "HEIGHT,WIDTH in pixels; by default the run's.")
    flags.DEFINE_integer("margin", None, "Context in pixels; by default the run's.", lower_bound=0)
    flags.DEFINE_float("max_megapixels", 1000, "Larger images are left out.", lower_bound=0)
    command.run(main)
