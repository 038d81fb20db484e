"""Segments image files of any size.

python -m dense_jax.predict --workdir=DIR --images='GLOB' --output=OUT

Writes OUT/NAME.png, the class ids as palette indices at the image's own size, and
OUT/NAME_overlay.png. Exit status 1 if any file could not be read; the others are done.
"""

import glob
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from PIL import Image

from dense_jax import logger, mesh, plots, scoring, startup, train
from dense_jax.data import decode
from dense_jax.tiles import Tiles


def predict(
    directory: str,
    pattern: str,
    output: str | Path,
    checkpoint: str = "best",
    *,
    overwrite: bool = False,
) -> list[str]:
    """Segments the images that match a glob; returns what was wrong with those left out.

    Raises ValueError, before anything is read or written, if no file matches, if two images would
    have the same result, or if a result is there already and may not be overwritten.
    """
    output = Path(output)
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    if not files:
        raise ValueError(f"--images={pattern!r} matches no file")
    results = [path for file in files for path in result_paths(output, file)]
    if twice := sorted({path.name for path in results if results.count(path) > 1}):
        raise ValueError(f"several images would be written to {twice}: rename them")
    there = [path for path in results if path.exists()]
    if there and not overwrite:
        raise ValueError(f"{there[0]} exists ({len(there)} results do): pass --overwrite")

    loaded = train.load(directory, checkpoint)
    value_range = loaded.dataset.get("value_range")  # older runs have none
    images = ImageFiles(files, loaded.dataset["num_channels"], value_range)
    output.mkdir(parents=True, exist_ok=True)
    if not images.files:
        return images.problems
    palette = np.array(loaded.dataset["palette"], np.uint8)
    config = loaded.config.eval
    tiles = Tiles(images, config.tile_size, config.margin, loaded.run.context)
    stitcher = scoring.Stitcher(tiles)
    predict_step = loaded.run.predict_step
    step = mesh.map_examples(
        lambda variables, example: predict_step(variables, example["image"]), loaded.mesh
    )
    for numbers, classes in scoring.predict_tiles(
        jax.jit(step),
        loaded.variables,
        tiles,
        mesh=loaded.mesh,
        batch_size=config.batch_size,
        workers=0,
    ):
        for i, labels in stitcher.add(numbers, scoring.local(classes)):
            write(output, images.files[i], images[i]["image"], labels, palette)
    return images.problems


def result_paths(output: Path, file: Path) -> tuple[Path, Path]:
    """Where an image's class ids and overlay go."""
    return output / f"{file.stem}.png", output / f"{file.stem}_overlay.png"


def write(
    output: Path, file: Path, image: np.ndarray, labels: np.ndarray, palette: np.ndarray
) -> None:
    """Writes one image's results."""
    ids, overlaid = result_paths(output, file)
    plots.indexed(labels, palette).save(ids)
    Image.fromarray(plots.overlay(image, labels, palette)).save(overlaid)


class ImageFiles:
    """Image files as a source without truth; those that cannot be read are left out, and said."""

    def __init__(self, files: list[Path], num_channels: int, value_range: decode.Range | None):
        self._num_channels = num_channels
        self._value_range = value_range
        self.files, self.problems, sizes = [], [], []
        for file in files:
            try:
                sizes.append(self._read(file).shape[:2])
                self.files.append(file)
            except ValueError as error:
                self.problems.append(str(error))
        self.sizes = np.array(sizes, np.int32).reshape(-1, 2)

    def _read(self, file: Path) -> np.ndarray:
        with file.open("rb") as opened:
            return decode.read_image(
                opened, str(file), self._num_channels, value_range=self._value_range
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = self._read(self.files[i])
        return {"image": image, "label": np.zeros(image.shape[:2], np.uint8), "name": ""}


def main(argv: list[str]) -> None:
    """Predicts and says what could not be read."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]} (quote the glob of --images)")
    logger.show_own_lines()
    startup.keep_programs()
    startup.keep_memory()
    args = flags.FLAGS
    problems = predict(
        args.workdir, args.images, args.output, args.checkpoint, overwrite=args.overwrite
    )
    print(f"results are in {args.output}")
    if problems:
        sys.exit("\n".join([*problems, f"{len(problems)} images were left out"]))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Of a run of dense_jax.main.", required=True)
    flags.DEFINE_string("images", None, "Glob of image files; quote it.", required=True)
    flags.DEFINE_string("output", None, "Folder for the results.", required=True)
    flags.DEFINE_string("checkpoint", "best", "best (by eval/mean_iou), latest or STEP.")
    flags.DEFINE_bool("overwrite", False, "Replace results that are there already.")
    app.run(main)
