"""Draws a contact sheet of the augmentations for one example of a folder dataset.

python -m benchmarks.augmented --root=CAMVID --index=200 --output=docs/augmented_camvid.jpg

Each cell shows an image, and below it the image with its label. Class 0 is clear, and ignored pixels
are white. The first cell shows the original example. The following cells show one augmentation each,
in the strongest of NUM_DRAWS random draws. The last cells show all augmentations together.
"""

import argparse
import functools

import jax
import matplotlib.figure
import numpy as np

from dense_jax import class_colors, data, drawing
from dense_jax.training.augment import augment as augment_fn
from dense_jax.training.color_jitter import RGB_ONLY

STRENGTHS = {
    "flip": 0.5,
    "flip_vertical": 0.5,
    "scale": 0.5,
    "rotation": 30,
    "shear": 20,
    "elastic": 10,
    "brightness": 0.4,
    "contrast": 0.5,
    "saturation": 0.8,
    "hue": 40,
    "gamma": 0.7,
    "blur": 3,
    "noise": 30,
}
NUM_DRAWS = 8
NUM_COLUMNS = 5


def main() -> None:
    """Parses the flags and draws the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="the dataset's folder")
    parser.add_argument("--split", default="train")
    parser.add_argument("--index", type=int, default=0, help="index of the example")
    parser.add_argument("--output", required=True, help="image file")
    parser.add_argument(
        "--strengths",
        nargs="*",
        metavar="NAME=STRENGTH",
        default=[f"{name}={strength}" for name, strength in STRENGTHS.items()],
        help="values of config.augment (default: all that fit the image's channels)",
    )
    arguments = parser.parse_args()
    source = data.open_dataset("folder", arguments.root, arguments.split)
    strengths = {
        name: float(strength)
        for name, strength in (each.split("=") for each in arguments.strengths)
        if source.num_channels == 3 or name not in RGB_ONLY
    }
    example = source[arguments.index]
    image, label = example["image"], example["label"]
    size = np.array(label.shape, np.int32)
    there = {"image": image, "label": label.astype(np.uint8), "size": size}
    keys = jax.random.split(jax.random.key(0), NUM_DRAWS)

    def draw(options: dict[str, float]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns NUM_DRAWS augmented (image, label) pairs, sorted by the change, largest first."""
        augment = jax.vmap(
            functools.partial(augment_fn, crop_size=label.shape, **options), in_axes=(0, None)
        )
        crops = jax.tree.map(np.asarray, jax.jit(augment)(keys, there))
        order = np.argsort(-np.abs(crops["image"] - image).mean(axis=(1, 2, 3)))
        return [(crops["image"][i].round().astype(np.uint8), crops["label"][i]) for i in order]

    cells = [("the example", (image, label))]
    cells += [(f"{name} {each:g}", draw({name: each})[0]) for name, each in strengths.items()]
    cells += [("all together", each) for each in draw(strengths)]
    num_rows = len(cells) // NUM_COLUMNS  # full rows only

    height, width = label.shape
    figure = matplotlib.figure.Figure(
        figsize=(2 * NUM_COLUMNS, num_rows * (4 * height / width + 0.25)), layout="constrained"
    )
    for axes, (title, (pixels, classes)) in zip(
        figure.subplots(num_rows, NUM_COLUMNS, squeeze=False).flat, cells, strict=False
    ):
        labeled = drawing.overlay(pixels, classes, class_colors.palette_of(source))
        axes.imshow(np.concatenate([drawing.to_rgb(pixels), labeled]))
        axes.set_title(title, fontsize=8)
        axes.axis("off")
    figure.savefig(arguments.output, dpi=85)


if __name__ == "__main__":
    main()
