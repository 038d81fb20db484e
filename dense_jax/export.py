"""Exports a trained network to a file, for `dense_jax.load` or for use without this package.

python -m dense_jax.export --workdir=DIR --output=FILE

With --card, writes a folder for a model hub instead; see `card`. See `inference.exported` for the file format, and docs/export.md for usage.
"""

from absl import flags

from dense_jax import command

if __name__ == "__main__":  # above the slow imports, so that --help answers at once
    command.define_folder(
        "workdir", "Workdir of a run of dense_jax.main.", required=True, bucket="run"
    )
    command.define_path(
        "output",
        "The file, or with --card the folder, to write.",
        required=True,
        bucket="output",
    )
    flags.DEFINE_string("checkpoint", "best", "best (by eval/mean_iou), latest or STEP.")
    flags.DEFINE_string("license", None, "License of the weights, stated in the file.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing file.")
    flags.DEFINE_bool("card", False, "Write a folder for a model hub, with README.md and scores.")
    command.help_if_asked()

import hashlib
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import numpy as safetensors

from dense_jax import card, storage, trained
from dense_jax.data import levels
from dense_jax.devices import runtime
from dense_jax.inference import exported
from dense_jax.program import Program, normalization
from dense_jax.workdir import files

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(
    directory: str,
    output: epath.PathLike,
    checkpoint: str = "best",
    *,
    license: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the network of a workdir to the file `output`. Returns the content of model.json.

    license: The license of the weights. If None, the file says that no license is stated.

    Raises ValueError or OSError if the checkpoint does not exist, if the file cannot be written, or
    if the file exists and `overwrite` is False.
    """
    path = epath.Path(output)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass a file as --output")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: pass --overwrite, or another --output")
    loaded = trained.load(directory, checkpoint)
    weights: Any = traverse_util.flatten_dict(loaded.variables, sep="/")
    about = describe(loaded, directory, license)
    with storage.atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        dtype, name = loaded.dataset["dtype"], normalization(loaded.config.model)
        program = trace(
            *(loaded.program, weights, loaded.dataset["num_channels"]),
            dtype=dtype,
            has_levels=levels.are_needed(name, dtype),
        ).serialize()
        about["program_sha256"] = hashlib.sha256(program).hexdigest()
        arrays = {name: np.asarray(array) for name, array in weights.items()}
        for name, content in (
            ("model.json", json.dumps(storage.to_json(about), indent=2).encode()),
            ("program.bin", program),
            ("weights.safetensors", safetensors.save(arrays)),
        ):
            archive.writestr(zipfile.ZipInfo(name), content)
    return about


def trace(
    network: Program,
    weights: Mapping[str, Any],
    num_channels: int,
    *,
    dtype: str = "uint8",
    has_levels: bool = False,
) -> jax.export.Exported:
    """Returns a program (weights, images) -> logits that accepts any number and size of images.

    If `has_levels`, the program is (weights, images, levels) -> logits; see `data.levels`. The
    program processes images one by one, so that logits do not depend on the number of images.
    """

    def program(weights, *images):
        variables = traverse_util.unflatten_dict(weights, sep="/")
        return jax.lax.map(lambda image: network.logits_step(variables, *image), images)

    smallest = 2 * network.context + 1
    sizes = jax.export.symbolic_shape(
        "b, h, w", constraints=[f"h >= {smallest}", f"w >= {smallest}"]
    )
    images = [jax.ShapeDtypeStruct((*sizes, num_channels), dtype)]
    if has_levels:
        images.append(jax.ShapeDtypeStruct((sizes[0], 2, num_channels), "float32"))
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    return jax.export.export(jax.jit(program), platforms=PLATFORMS)(shapes, *images)


def describe(loaded: trained.Trained, directory: str, license: str | None) -> dict[str, Any]:
    """Returns the content of model.json except `program_sha256`.

    Some of the fields are:
    dataset: The content of the run's dataset.json.
    context: The number of pixels without logits on each side of an image; 0 for padded networks.
    tile_size, margin, batch_size: The values in config.eval.
    resolution, normalization: How the program preprocesses the image; see `data.levels`.
    """
    config, environment = loaded.config, files.read(directory, "environment.json")
    license = license or environment.get("license")  # a card has one
    if license is None:
        sources = [f"{config.data.name} {config.data.root}".rstrip()]
        origin = environment.get("initial_weights")
        while origin:  # the weights that the run began with, those that they began with, ...
            sources.append(f"{origin['source']} (license: {origin['license'] or 'not known'})")
            origin = origin.get("initial_weights")
        license = (
            "not stated: whoever shares the weights must choose one; made from "
            + " and ".join(sources)
        )
    return {
        "format": exported.FORMAT,
        "format_version": exported.VERSION,
        "dataset": loaded.dataset,
        "license": license,
        "resolution": config.data.resolution,
        "normalization": normalization(config.model),
        "context": loaded.program.context,
        **{name: config.eval[name] for name in ("tile_size", "margin", "batch_size")},
        "step": loaded.step,
        "config": config.to_dict(),
        "trained_with": environment,
        "exported_with": files.environment(),
    }


def main(argv: list[str]) -> None:
    """Exports the network and prints a summary."""
    runtime.prepare()
    args = flags.FLAGS
    if args.card:
        card.write(args.workdir, args.output, args.checkpoint, license=args.license, export=export)
        print(
            f"{args.output} has the card. Before `hf upload OWNER/NAME {args.output}`, read its "
            "README.md, and look whether its pictures of the data may be shared"
        )
        return
    about = export(
        args.workdir, args.output, args.checkpoint, license=args.license, overwrite=args.overwrite
    )
    print(f"{args.output} has the network of step {about['step']}; license: {about['license']}")


if __name__ == "__main__":
    command.run(main)
