"""Prints the TPU compiler's estimates for training steps. Needs libtpu, but no TPU.

pip install "jax[tpu]"
python -m benchmarks.tpu --topology=v5e-4 [--network=NAME ...]

Each device has 8 images, in bfloat16. The estimates exclude the time of collectives.
"""

import argparse

from dense_jax import command, summary
from dense_jax.devices import tpu_compiler
from dense_jax.evaluation.tables import markdown_table

IMAGES = 8  # on each device
WIDTHS = (64, 128, 256, 512, 1024)
NETWORKS = {  # the experiment, the size of the images, and the changed options
    "unet64, 512 x 512": ("unet_dice", 512, {"model.widths": WIDTHS}),
    "unet64, 256 x 256": ("unet_dice", 256, {"model.widths": WIDTHS}),
    "unet64, 256 x 256, bilinear": (
        "unet_dice",
        256,
        {"model.widths": WIDTHS, "model.upsampling": "bilinear"},
    ),
    "unet_resnet34, 512 x 512": ("unet_resnet34", 512, {}),
    "fcn8s_vgg16, 512 x 512": ("fcn8s_vgg16", 512, {}),
    "unet_dice, 64 x 64": ("unet_dice", 64, {}),
}
COLUMNS = "work", "temporaries", "cycles", "time", "of the peak", "images per second"


def main() -> None:
    """Parses the flags and prints a row per network as soon as it is compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e-4", help="see dense_jax.summary")
    parser.add_argument("--network", action="append", choices=NETWORKS, help="by default, all")
    args = parser.parse_args()
    devices, chip = tpu_compiler.describe(args.topology)
    rows = [("network", *COLUMNS)]
    for name in args.network or NETWORKS:
        experiment, size, fields = NETWORKS[name]
        config = command.load_config(f"experiments/{experiment}.py")
        with config.ignore_type():
            config.update_from_flattened_dict(fields)
        config.batch_size = IMAGES * len(devices)
        config.data.crop_size = (size, size)
        config.model.dtype = "bfloat16"
        step = next(summary.tpu_steps(config, 21, 3, devices))
        numbers = summary.tpu_row(step, len(devices), chip)
        rows.append((name, *(numbers[column] for column in COLUMNS)))
        print(" | ".join(rows[-1]), flush=True)
    print(f"\n{markdown_table(rows, padded=True)}")


if __name__ == "__main__":
    main()
