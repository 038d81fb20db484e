"""Writes a trained network as one file, to be used without this package, or by `dense_jax.load`.

python -m dense_jax.export --workdir=DIR --output=FILE

See `exported` for what is in the file, and docs/export.md for how to use it.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from flax import traverse_util
from safetensors import numpy as safetensors

from dense_jax import command, storage
from dense_jax.devices import runtime as startup
from dense_jax.inference import exported
from dense_jax.program import Program, normalization
from dense_jax.trained import Trained, load
from dense_jax.workdir import files as workdir

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(
    directory: str,
    output: epath.PathLike,
    checkpoint: str = "best",
    *,
    license: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Exports a workdir's network; returns what model.json says.

    license: of the weights; None says where they come from.

    Raises ValueError or OSError, before anything is traced, if there is no such checkpoint, or if the
    file cannot be written or is there and may not be overwritten.
    """
    path = epath.Path(output)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass a file as --output")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: pass --overwrite, or another --output")
    loaded = load(directory, checkpoint)
    weights: Any = traverse_util.flatten_dict(loaded.variables, sep="/")
    about = describe(loaded, directory, license)
    with storage.atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        program = trace(loaded.program, weights, loaded.dataset["num_channels"]).serialize()
        about["program_sha256"] = hashlib.sha256(program).hexdigest()
        members = {
            "model.json": json.dumps(storage.to_json(about), indent=2).encode(),
            "program.bin": program,
            "weights.safetensors": safetensors.save(
                {name: np.asarray(array) for name, array in weights.items()}
            ),
        }
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return about


def trace(network: Program, weights: Mapping[str, Any], num_channels: int) -> jax.export.Exported:
    """The program of (weights, images), for images of any number and size.

    It takes them one after the other: their logits do not depend on how many there are.
    """

    def program(weights, images):
        variables = traverse_util.unflatten_dict(weights, sep="/")
        return jax.lax.map(lambda image: network.logits_step(variables, image), images)

    smallest = 2 * network.context + 1
    sizes = jax.export.symbolic_shape(
        "b, h, w", constraints=[f"h >= {smallest}", f"w >= {smallest}"]
    )
    images = jax.ShapeDtypeStruct((*sizes, num_channels), "uint8")
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    return jax.export.export(jax.jit(program), platforms=PLATFORMS)(shapes, images)


def describe(loaded: Trained, directory: str, license: str | None) -> dict[str, Any]:
    """What the model is: all that its users need, and where it comes from.

    dataset: as in dataset.json. context: pixels on every side of the image for which there are no
    logits, 0 but for unpadded convolutions. tile_size, margin, batch_size: as of config.eval.
    resolution, normalization: what the program does to the image first.
    """
    config, model = loaded.config, loaded.config.model
    if license is None:
        sources = f"{config.data.name} {config.data.root}".rstrip()
        if model.pretrained:
            sources += f" and {model.pretrained}"
        license = f"not stated: that is for whoever shares the weights, made from {sources}"
    return {
        "format": exported.FORMAT,
        "format_version": exported.VERSION,
        "dataset": loaded.dataset,
        "license": license,
        "resolution": config.data.resolution,
        "normalization": normalization(model),
        "context": loaded.program.context,
        **{name: config.eval[name] for name in ("tile_size", "margin", "batch_size")},
        "step": loaded.step,
        "config": config.to_dict(),
        "trained_with": workdir.read(directory, "environment.json"),
        "exported_with": workdir.environment(),
    }


def main(argv: list[str]) -> None:
    """Exports and says what was written."""
    startup.prepare()
    args = flags.FLAGS
    about = export(
        args.workdir, args.output, args.checkpoint, license=args.license, overwrite=args.overwrite
    )
    print(f"{args.output} has the network of step {about['step']}; license: {about['license']}")


if __name__ == "__main__":
    command.define_folder("workdir", "Of a run of dense_jax.main.", required=True)
    command.define_path("output", "The file to write.", required=True)
    flags.DEFINE_string("checkpoint", "best", "best (by eval/mean_iou), latest or STEP.")
    flags.DEFINE_string("license", None, "Of the weights, for those who get the file.")
    flags.DEFINE_bool("overwrite", False, "Replace a file that is there already.")
    command.run(main)
