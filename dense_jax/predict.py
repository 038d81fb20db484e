"""Segments image files of any size.

python -m dense_jax.predict --workdir=DIR --images='GLOB' --output=OUT

Writes these files, where NAME is the name of an image file without its extension:
  OUT/NAME.png: The class IDs as palette indices, at the size of the image.
  OUT/NAME_overlay.png: The image, overlaid with the class colors.
  OUT/legend.png: The colors and names of the classes.
  OUT/NAME_probabilities.npy or .tif: The probabilities, float16 [h, w, num_classes] (optional).
  OUT/NAME_uncertainty.png: The entropy of the probabilities, in gray (optional).
Each page of a multi-page file is an image called NAME_page000, NAME_page001, ...

Images are read, segmented and written one row of tiles at a time, so memory use does not depend on
the image height. If an image cannot be read or its results cannot be written, the image is skipped
and the exit status is 1. A full disk ends the command.
"""

import itertools
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from absl import flags

from dense_jax import class_colors, command, drawing, storage
from dense_jax.devices import runtime
from dense_jax.inference import image_files, threads, tta, writers
from dense_jax.inference.predictor import Predictor, entropy, load
from dense_jax.inference.stitching import Failure, Strip

NUM_LANES = 4  # the number of threads that compress results
# The results that are computed from probabilities [n, m, num_classes].
MAPS = {"probabilities": lambda block: block.astype(np.float16), "uncertainty": entropy}


def predict(
    directory: str,
    images: str | Sequence[str],
    output: str | Path,
    checkpoint: str = "best",
    *,
    overwrite: bool = False,
    opacity: float = drawing.OPACITY,
    probabilities: str | None = None,
    uncertainty: bool = False,
    max_megapixels: float = 1000,
    **options: Any,
) -> list[str]:
    """Segments images and writes the results. Returns the errors for skipped images.

    images: A file, folder or glob, or a list of these; see `image_files`.
    opacity: The opacity of the class colors over the image, from 0 to 1.
    probabilities: The file format "npy" or "tif". If None, no probabilities are written.
    max_megapixels: The maximum image size. Larger images are skipped.
    options: The options of `Predictor.using`.

    Before anything is written, raises ValueError if `images` names no file, if two images would
    have result files with equal names, or if a result exists and `overwrite` is False.
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
    readable, problems = image_files.headers(paths, 1e6 * max_megapixels)
    results = [output / (image.name + ending) for image in readable for ending in endings.values()]
    legend = output / "legend.png"
    _check(results, legend, overwrite, {os.path.realpath(path) for path in paths})
    predictor = load(directory, checkpoint).using(**options)
    output.mkdir(parents=True, exist_ok=True)
    if overwrite or not legend.exists():
        picture = drawing.legend(class_colors.colors_of(predictor.class_names, predictor.palette))
        with storage.atomic(legend) as file:
            PIL.Image.fromarray(picture).save(file, "PNG")
    if readable:
        problems += _segment(predictor, readable, output, endings, opacity)
    return problems


def _check(results: Sequence[Path], legend: Path, overwrite: bool, images: Collection[str]) -> None:
    """Raises ValueError if two results share a path or an existing file must not be replaced."""
    counts = Counter([*results, legend])
    if repeated := sorted(path.name for path, count in counts.items() if count > 1):
        raise ValueError(f"several images would be written to {repeated}: rename them")
    existing = [path for path in results if os.path.exists(path)]  # no error for overlong names
    for path in existing:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, where a result would be: move it away")
        if os.path.realpath(path) in images:
            raise ValueError(f"{path} is one of --images: pass another --output")
    if existing and not overwrite:
        raise ValueError(f"{existing[0]} exists ({len(existing)} results do): pass --overwrite")


def _segment(
    predictor: Predictor,
    images: Sequence[image_files.Image],
    output: Path,
    endings: Mapping[str, str],
    opacity: float,
) -> list[str]:
    """Segments images and writes the results. Returns the errors for images that were skipped."""
    source = image_files.ImageFiles(
        images, predictor.num_channels, predictor.value_range, predictor.dtype
    )
    maps = {kind: make for kind, make in MAPS.items() if kind in endings}
    problems: list[str] = []
    unfinished: set[writers.Together] = set()

    def end(results: writers.Together, calls: Iterable[Future]) -> None:
        for call in calls:
            call.result()
        results.end()
        unfinished.discard(results)
        if results.problem:
            problems.append(results.problem)

    next_lane = itertools.count().__next__
    strips = predictor.segment(source, maps)
    try:
        with threads.lanes(NUM_LANES) as submit:
            for index, image_strips in itertools.groupby(strips, lambda strip: strip.index):
                files = _files(predictor, images[index], output, endings)
                lanes = {kind: next_lane() for kind in files}
                results = writers.Together(files)
                unfinished.add(results)
                calls: list[Future] = []  # the calls for the latest strip, last in their lanes
                for strip in image_strips:
                    if isinstance(strip, Failure):
                        results.problem = str(strip.problem)
                        continue
                    calls = [
                        submit(lane, results.write, kind, _rows(kind, strip, predictor, opacity))
                        for kind, lane in lanes.items()
                    ]
                submit(next_lane(), end, results, calls)
    finally:
        for results in unfinished:
            results.remove()
    return problems


def _files(
    predictor: Predictor, image: image_files.Image, output: Path, endings: Mapping[str, str]
) -> dict[str, writers.Rows]:
    """Returns the result files of an image as {kind: file}."""
    files: dict[str, writers.Rows] = {}
    for kind, ending in endings.items():
        path = output / (image.name + ending)
        if kind == "probabilities":
            files[kind] = writers.Array(path, (*image.size, len(predictor.class_names)))
        else:
            palette = predictor.palette if kind == "classes" else None
            files[kind] = writers.Png(path, image.size, rgb=kind == "overlay", palette=palette)
    return files


def _rows(kind: str, strip: Strip, predictor: Predictor, opacity: float) -> Iterator[np.ndarray]:
    """Yields the rows that a strip adds to the result file of a given kind."""
    if kind != "overlay":
        yield strip.maps[kind]
        return
    image, classes = strip.maps["image"], strip.maps["classes"]
    num_rows = max(1, 2**20 // image.shape[1])  # blending takes 8 bytes per color value
    for y in range(0, len(image), num_rows):
        part = slice(y, y + num_rows)
        yield drawing.overlay(image[part], classes[part], predictor.palette, opacity)


def main(argv: list[str]) -> None:
    """Segments the images and prints the errors for skipped images."""
    runtime.prepare()
    args = flags.FLAGS
    names = ("overwrite", "opacity", "probabilities", "uncertainty", "max_megapixels")
    names += ("tile_size", "margin", "batch_size", "blend", "augment")
    problems = predict(
        args.workdir,
        list(map(os.path.expanduser, args.images)),
        args.output,
        args.checkpoint,
        **{name: getattr(args, name) for name in names},
    )
    print(f"results are in {args.output}")
    if problems:
        sys.exit("\n".join([*problems, f"{len(problems)} images were skipped"]))


if __name__ == "__main__":
    command.define_path(
        "workdir",
        "Workdir of a run of dense_jax.main, or a file written by dense_jax.export.",
        required=True,
    )
    flags.DEFINE_list(
        "images",
        None,
        "Files, folders and globs, separated by commas; quote globs, and put double quotes around "
        "a name that contains a comma.",
        required=True,
    )
    command.define_folder("output", "Folder for the results.", required=True)
    flags.DEFINE_string("checkpoint", "best", "best (by eval/mean_iou), latest or STEP.")
    flags.DEFINE_bool("overwrite", False, "Replace existing results.")
    flags.DEFINE_float(
        "opacity", drawing.OPACITY, "Opacity of the overlay's colors.", lower_bound=0, upper_bound=1
    )
    flags.DEFINE_enum("probabilities", None, ["npy", "tif"], "Write the class probabilities.")
    flags.DEFINE_bool("uncertainty", False, "Write the entropy of the probabilities.")
    flags.DEFINE_bool("blend", False, "Blend the predictions of tiles where they overlap.")
    flags.DEFINE_list(
        "augment", [], f"Average over transformed images: {', '.join(tta.AUGMENTATIONS)}."
    )
    flags.DEFINE_integer("batch_size", None, "Tiles per step; by default the run's.", lower_bound=1)
    command.define_size("tile_size", None, "HEIGHT,WIDTH in pixels; by default the run's.")
    flags.DEFINE_integer(
        "margin", None, "Margin around tile cores in pixels; by default the run's.", lower_bound=0
    )
    flags.DEFINE_float("max_megapixels", 1000, "Larger images are skipped.", lower_bound=0)
    command.run(main)
