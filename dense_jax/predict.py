"""Segments image files of any size.

python -m dense_jax.predict --workdir=DIR --images='GLOB' --output=OUT

Writes these files, where NAME is the name of an image file without its extension:
  OUT/NAME.png: The class IDs as palette indices, at the size of the image. For a TIFF file with
    geo tags or a nodata value, OUT/NAME.tif instead: a GeoTIFF file with the same geo tags, where
    255 is nodata. If the network learned regions, instead NAME_REGION.png for each region: its
    mask, 255 inside and 0 outside, or NAME_REGION.tif with 1 and 0.
  OUT/NAME_overlay.png: The image, overlaid with the class colors. Class 0 stays clear. Where
    regions overlap, the color is that of the last one, in the order of dataset.json.
  OUT/legend.png: The colors and names of the classes that are in the results.
  OUT/NAME_probabilities.npy or .tif: The probabilities, float16 [h, w, num_classes] (optional), or
    of each region.
  OUT/NAME_uncertainty.png: The entropy of the probabilities, in gray (optional). With several
    workdirs, an ensemble, also its two parts, on the same scale: NAME_expected_entropy.png, the
    mean entropy of the networks, and NAME_mutual_information.png, which is their dispute.
With --objects, also these; see `inference.object_maps`:
  OUT/NAME_objects.png: The number of each pixel's object, 16 bits, 0 outside all objects.
  OUT/objects.csv: Class, area, centroid, bounding box and mean probability of every object.
  OUT/counts.csv: The number of objects of each class in each image.
Each page of a multi-page file is an image called NAME_page000, NAME_page001, ...

Images are read, segmented and written one row of tiles at a time, so memory use does not depend on
the image height. Only --objects holds a whole image in memory. If an image cannot be read or its
results cannot be written, the image is skipped and the exit status is 1. A full disk ends the
command. --images and --output may be in a bucket (gs://). Results are copied there at the end.
"""

from absl import flags

from dense_jax import command, drawing

if __name__ == "__main__":  # above the slow imports, so that --help answers at once
    command.define_workdirs(
        "Workdir of a run of dense_jax.main, or several: an ensemble; or a file of dense_jax.export; "
        "or hf://OWNER/NAME."
    )
    flags.DEFINE_list(
        "images",
        None,
        "Files, folders and globs, separated by commas; quote globs, and put double quotes around "
        "a name that contains a comma.",
        required=True,
    )
    command.define_folder("output", "Folder for the results.", required=True, bucket="output")
    flags.DEFINE_string("checkpoint", "best", "best (by eval/mean_iou), latest or STEP.")
    command.define_path(
        "calibration", "calibration.json whose temperature and thresholds to apply."
    )
    flags.DEFINE_bool("overwrite", False, "Replace existing results.")
    flags.DEFINE_float(
        "opacity",
        None,
        "Opacity of the overlay's colors; by default 0.5, and 1 for outlines.",
        lower_bound=0,
        upper_bound=1,
    )
    flags.DEFINE_bool("outlines", False, "Draw the borders of classes instead of their areas.")
    flags.DEFINE_list(
        "objects", [], "CLASS,... whose objects to number and measure; all: all but class 0."
    )
    flags.DEFINE_string(
        "border_class", None, "Class of the borders between objects, which get its pixels."
    )
    flags.DEFINE_enum("probabilities", None, ["npy", "tif"], "Write the class probabilities.")
    flags.DEFINE_bool("uncertainty", False, "Write the entropy of the probabilities.")
    flags.DEFINE_bool("blend", False, "Blend the predictions of tiles where they overlap.")
    flags.DEFINE_list(
        "augment", [], "Average over transformed images: flip, flips, turns or scales, or several."
    )
    flags.DEFINE_integer("batch_size", None, "Tiles per step; by default the run's.", lower_bound=1)
    command.define_size("tile_size", None, "HEIGHT,WIDTH in pixels; by default the run's.")
    flags.DEFINE_integer(
        "margin", None, "Margin around tile cores in pixels; by default the run's.", lower_bound=0
    )
    flags.DEFINE_float("max_megapixels", 1000, "Larger images are skipped.", lower_bound=0)
    command.help_if_asked()

import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from dense_jax import class_colors, storage
from dense_jax.devices import runtime
from dense_jax.inference import image_files, object_maps, results, threads, writers
from dense_jax.inference.predictor import Predictor, load
from dense_jax.inference.stitching import Failure

NUM_LANES = 4  # the number of threads that compress results
LEGEND_KEY = "dense_jax classes"  # the text in legend.png with its {class name: RGB}


class Written(NamedTuple):
    """The facts about the results, once they are written."""

    problems: list[str]  # the errors for images that were skipped
    classes: set[int]  # the classes in the results
    objects: dict[int, list[tuple]]  # the rows of objects.csv, by the index of the image


def predict(
    directory: str | Sequence[str],
    images: str | Sequence[str],
    output: str | Path,
    checkpoint: str = "best",
    *,
    calibration: str | None = None,
    overwrite: bool = False,
    opacity: float | None = None,
    outlines: bool = False,
    probabilities: str | None = None,
    uncertainty: bool = False,
    objects: Sequence[str] = (),
    border_class: str | None = None,
    max_megapixels: float = 1000,
    **options: Any,
) -> list[str]:
    """Segments images and writes the results. Returns the errors for skipped images.

    directory, checkpoint, calibration: See `predictor.load`.
    images: A file, folder or glob, or a list of these; see `image_files`.
    opacity: The opacity of the class colors over the image, from 0 to 1. If None, 0.5, and 1 for
      outlines.
    outlines: Whether overlays show the borders of the classes instead of their areas.
    probabilities: The file format "npy" or "tif". If None, no probabilities are written.
    objects, border_class: The classes whose objects are written; see `object_maps.kinds`.
    max_megapixels: The maximum image size. Larger images are skipped.
    options: The options of `Predictor.using`.

    Before anything is written, raises ValueError if `images` names no file, if two images would
    have result files with equal names, or if a result exists and `overwrite` is False.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is a file: it must be a folder")
    paths = image_files.find([images] if isinstance(images, str) else images, output)
    kinds = ["classes", "overlay", *["uncertainty"] * uncertainty, *["objects"] * bool(objects)]
    if uncertainty and not isinstance(directory, str) and len(directory) > 1:
        kinds += ["expected_entropy", "mutual_information"]
    predictor = load(directory, checkpoint, calibration).using(**options)
    endings = results.endings(kinds, predictor.regions)
    if probabilities:
        endings["probabilities"] = f"_probabilities.{probabilities}"
    readable, problems = image_files.headers(paths, 1e6 * max_megapixels)
    files = [path for image in readable for path in results.paths(image, output, endings).values()]
    tables = [output / "objects.csv", output / "counts.csv"] if objects else []
    legend = output / "legend.png"
    _check([*files, *tables], legend, overwrite, {os.path.realpath(path) for path in paths})
    if objects and predictor.regions and len(predictor.regions.names) > 1:
        raise ValueError("--objects is for classes, or a single region: regions may overlap")
    colors = class_colors.prediction_colors(predictor)
    object_kinds = object_maps.kinds(list(colors), objects, border_class)
    output.mkdir(parents=True, exist_ok=True)
    if opacity is None:
        opacity = 1.0 if outlines else drawing.OPACITY
    wanted = results.Wanted(endings, opacity, outlines, object_kinds)
    written = Written(problems, set(), {})
    if readable:
        _segment(predictor, readable, output, wanted, written)
    if objects:
        rows = {readable[i].name: written.objects[i] for i in sorted(written.objects)}
        object_maps.write_tables(rows, object_kinds.classes.values(), *tables)
    _write_legend(legend, colors, written.classes, overwrite)
    return written.problems


def _check(files: Sequence[Path], legend: Path, overwrite: bool, images: Collection[str]) -> None:
    """Raises ValueError if two results share a path or an existing file must not be replaced."""
    counts = Counter([*files, legend])
    if repeated := sorted(path.name for path, count in counts.items() if count > 1):
        raise ValueError(f"several results would be {repeated}: rename the images, or the regions")
    existing = [path for path in files if os.path.exists(path)]  # no error for overlong names
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
    wanted: results.Wanted,
    written: Written,
) -> None:
    """Segments images, writes their results, and adds what is known of them to `written`."""
    source = image_files.ImageFiles(
        images, predictor.num_channels, predictor.value_range, predictor.dtype
    )
    unfinished: set[writers.Together] = set()

    def end(
        index: int, image: results.ImageResults, files: writers.Together, calls: Iterable[Future]
    ) -> None:
        for call in calls:
            call.result()
        files.end()
        unfinished.discard(files)
        if files.problem:
            written.problems.append(files.problem)
        else:
            written.classes.update(image.classes)
            written.objects[index] = image.objects.rows

    next_lane = itertools.count().__next__
    strips = predictor.segment(source, results.maps(wanted, predictor.regions))
    try:
        with threads.lanes(NUM_LANES) as submit:
            for index, image_strips in itertools.groupby(strips, lambda strip: strip.index):
                image = results.ImageResults(images[index], output, predictor, wanted)
                files = writers.Together(image.files)
                lanes = {kind: next_lane() for kind in image.files}
                unfinished.add(files)
                calls: list[Future] = []  # the calls for the latest strip, last in their lanes
                for strip in image.prepared(image_strips):
                    if isinstance(strip, Failure):
                        files.problem = str(strip.problem)
                        continue
                    calls = [
                        submit(lane, files.write, kind, image.rows(kind, strip))
                        for kind, lane in lanes.items()
                    ]
                submit(next_lane(), end, index, image, files, calls)
    finally:
        for files in unfinished:
            files.remove()


def _write_legend(
    path: Path, colors: dict[str, Sequence[int]], classes: Collection[int], overwrite: bool
) -> None:
    """Writes the colors and names of classes. If not `overwrite`, adds them to an earlier legend.

    colors: Those of all classes, in their order.

    A file without LEGEND_KEY is not a legend of ours, and stays as it is unless `overwrite`.
    """
    shown = {name: color for c, (name, color) in enumerate(colors.items()) if c in classes}
    if path.exists() and not overwrite:
        try:
            with PIL.Image.open(path) as earlier:
                shown |= json.loads(earlier.info[LEGEND_KEY])
        except (OSError, KeyError):
            return
    if shown:
        shown = {name: shown[name] for name in colors | shown if name in shown}
        about = PngInfo()
        about.add_text(LEGEND_KEY, json.dumps(shown))
        with storage.atomic(path) as file:
            PIL.Image.fromarray(drawing.legend(shown)).save(file, "PNG", pnginfo=about)


def main(argv: list[str]) -> None:
    """Segments the images and prints the errors for skipped images."""
    runtime.prepare()
    args = flags.FLAGS
    names = ("overwrite", "opacity", "outlines", "probabilities", "uncertainty", "max_megapixels")
    names += ("objects", "border_class", "tile_size", "margin", "batch_size", "blend", "augment")
    names += ("calibration",)
    with storage.working_copy(args.output) as output:
        problems = predict(
            args.workdir,
            list(map(os.path.expanduser, args.images)),
            output,
            args.checkpoint,
            **{name: getattr(args, name) for name in names},
        )
        if args.objects:
            print(object_maps.summarize(output / "counts.csv"))
    print(f"results are in {args.output}")
    if problems:
        sys.exit("\n".join([*problems, f"{len(problems)} images were skipped"]))


if __name__ == "__main__":
    command.run(main)
