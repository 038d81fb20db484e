"""Draws the predictions for three images: with a low, a median and a high mean IoU.

python -m dense_jax.evaluate --workdir=DIR --split=test
python -m benchmarks.predicted --workdir=DIR --split=test --output=docs/camvid_predicted.jpg
"""

import argparse
import json
import pathlib

import numpy as np
from PIL import Image

from dense_jax import data, metrics
from dense_jax.evaluation import class_maps

QUANTILES = 0.1, 0.5, 0.9  # of the images' mean IoU


def main() -> None:
    """Parses the flags and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="an evaluated run")
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", required=True, help="image file")
    arguments = parser.parse_args()
    path = pathlib.Path(arguments.workdir) / f"evaluation_{arguments.split}.json"
    evaluation = json.loads(path.read_text())
    source = data.open_dataset(evaluation["dataset"], evaluation["root"], arguments.split)
    with np.load(path.with_suffix(".npz")) as kept:
        scores = metrics.image_mean_ious(kept["confusion_matrices"])
    order = np.argsort(scores)
    numbers = [int(order[round(q * (len(order) - 1))]) for q in QUANTILES]
    picture = Image.fromarray(class_maps.draw(path.with_suffix(".zip"), source, numbers, scores))
    picture.thumbnail((1300, 1300))  # for a web page
    picture.save(arguments.output, quality=65, optimize=True)


if __name__ == "__main__":
    main()
