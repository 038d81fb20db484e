"""Draws a contact sheet of the augmentations for one example of a folder dataset.

python -m benchmarks.augmented --root=CAMVID --index=200 --output=docs/augmented_camvid.jpg

Each cell shows the image above a copy with its label, in which ignored pixels are white. The first
cell shows the original example. Each of the next cells shows a single augmentation: of NUM_DRAWS
random draws, the draw that changes the image most. The remaining cells show all augmentations
together.
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
    parser.add_argument("--root", required=True, help="folder of the dataset")
    parser.add_argument("--split", default="train")
    parser.add_argument("--index", type=int, default=0, help="which example of the split")
    parser.add_argument("--output", required=True, help="the picture")
    parser.add_argument(
        "--strengths",
        nargs="*",
        metavar="NAME=STRENGTH",
        default=[f"{name}={strength}" for name, strength in STRENGTHS.items()],
        help="of config.augment (default: all that the images' channels allow)",
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
        """Returns one augmented (image, label) pair per key, sorted by largest change first."""
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
