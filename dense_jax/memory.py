"""What a training step needs of each device, before any is run.

    python -m dense_jax.memory --config=experiments/unet_dice.py [--config.model.x=y]

Prints memory and FLOPs as a Markdown table, for config.batch_size over all devices there are. The
step is the one that `dense_jax.main` runs, compiled from shapes: no parameter and no image is made.
Images are on a canvas of data.canvas_size or, where it is not set, as large as the crops.
"""

from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from dense_jax import command
from dense_jax.devices import cost, mesh
from dense_jax.devices import runtime as startup
from dense_jax.program import assemble
from dense_jax.training import task


def analyze(config: ConfigDict, num_classes: int, num_channels: int) -> dict[str, int]:
    """XLA's own analysis of the compiled step, of one device: bytes, and "flops".

    A multiply-add is two FLOPs. The rest is as of `cost.memory`; what is aliased is the new state,
    which takes over from the old one. Not in it is the training set of data.cache="device".

    Raises ValueError if the devices cannot share seeds and batch evenly.
    """
    mesh.check_shares(config.num_seeds, config.batch_size, config.num_microbatches)
    fields = task.target_fields(config)
    program = assemble(config, num_classes)
    training = task.bind(config, program, num_channels, fields=fields)
    canvas = config.data.canvas_size or config.data.crop_size
    placed = task.place(config, training, task.batch_shapes(config, canvas, num_channels, fields))
    compiled = placed.train_step.lower(*placed.arguments, {}).compile()
    return cost.memory(compiled) | {"flops": int(compiled.cost_analysis()["flops"])}


def table(config: ConfigDict, num_classes: int, num_channels: int) -> str:
    """`analyze` as a Markdown table, and whose figures they are."""
    needed = analyze(config, num_classes, num_channels)
    gigaflops = needed.pop("flops") / 1e9
    device, n = jax.devices()[0], jax.device_count()
    about = (
        f"A training step of {config.batch_size * config.num_seeds // n} images on each of {n} "
        f"{device.device_kind}, by XLA:{device.platform.upper()}'s analysis"
    )
    about += ": a GPU's or TPU's program is another." if device.platform == "cpu" else "."
    rows = [f"| {name} | {size / 1e6:,.1f} MB |" for name, size in needed.items()]
    return "\n".join(
        [
            about,
            "",
            "| of each device | |",
            "| --- | ---: |",
            *rows,
            f"| work | {gigaflops:,.1f} GFLOP |",
        ]
    )


def main(argv: list[str]) -> None:
    """Prints the table."""
    startup.prepare()
    args: Any = flags.FLAGS
    print(table(args.config, args.num_classes, args.channels))


if __name__ == "__main__":
    command.define_config()
    flags.DEFINE_integer("num_classes", 21, "Channels of the logits.", lower_bound=1)
    flags.DEFINE_integer("channels", 3, "Of the image.", lower_bound=1)
    command.run(main, flags_parser=command.parse_flags)
