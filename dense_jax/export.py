"""Exports a trained network to a file, for `dense_jax.load` or for use without this package.

python -m dense_jax.export --workdir=DIR --output=FILE
python -m dense_jax.export --workdir=DIR --output=FILE.onnx --format=onnx --image_size=HEIGHT,WIDTH

With --card, writes a folder for a model hub instead; see `card`. See `inference.exported` for the
file format, and docs/export.md for usage.
"""

from absl import flags

from dense_jax import command

if __name__ == "__main__":  # above the slow imports, so that --help answers at once
    command.define_workdirs("Workdir of a run of dense_jax.main, or several: an ensemble.")
    command.define_path(
        "output",
        "The file, or with --card the folder, to write.",
        required=True,
        bucket="output",
    )
    flags.DEFINE_string("checkpoint", "best", "best (by eval/mean_iou), latest or STEP.")
    command.define_path("calibration", "calibration.json whose temperature to apply.")
    flags.DEFINE_string("license", None, "License of the weights, stated in the file.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing file.")
    flags.DEFINE_bool("card", False, "Write a folder for a model hub, with README.md and scores.")
    flags.DEFINE_enum("format", "stablehlo", ["stablehlo", "onnx"], "The kind of file.")
    command.define_size("image_size", None, "Of ONNX files: the HEIGHT,WIDTH of images.")
    flags.DEFINE_enum(
        *("result", "classes", ["classes", "probabilities"]), "Of ONNX files: what is computed."
    )
    command.help_if_asked()

import functools
import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jaxtyping import Array, Num
from safetensors import numpy as safetensors

from dense_jax import card, outputs, storage, trained
from dense_jax.data import levels
from dense_jax.devices import runtime
from dense_jax.inference import ensemble, exported, traced_levels
from dense_jax.program import Program, assemble, batch_logits, normalization
from dense_jax.workdir import files

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# The fields of dataset.json that the metadata of ONNX files repeats, by the name there.
FACTS = {"classes": "class_names", "colors": "palette", "regions": "regions"}


def export(
    directory: str | Sequence[str],
    output: epath.PathLike,
    checkpoint: str = "best",
    *,
    calibration: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the network of a workdir to the file `output`. Returns the content of model.json.

    directory: A workdir, or the workdirs of an ensemble.
    calibration: The calibration.json of the checkpoint; see `trained.load`.
    license: The license of the weights. If None, the file says that no license is stated.

    Raises ValueError or OSError if the checkpoint does not exist, if the file cannot be written, or
    if the file exists and `overwrite` is False.
    """
    path = _writable(output, overwrite)
    loaded = trained.load(directory, checkpoint, calibration)
    weights: Any = traverse_util.flatten_dict(loaded.variables, sep="/")
    directories = [directory] if isinstance(directory, str) else list(directory)
    about = describe(loaded, directories[0], license)
    with storage.atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        dtype, name = loaded.dataset["dtype"], normalization(loaded.config.model)
        program = trace(
            *(loaded.program, weights, loaded.dataset["num_channels"]),
            dtype=dtype,
            has_levels=levels.are_needed(name, dtype),
            num_networks=len(directories),
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


def export_onnx(
    directory: str | Sequence[str],
    output: epath.PathLike,
    checkpoint: str = "best",
    *,
    calibration: str | None = None,
    image_size: Sequence[int] | None,
    result: str = "classes",
    license: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the network of a workdir to the ONNX file `output`. Returns its description.

    directory: A workdir. An ensemble has no ONNX file.
    calibration: As in `export`.
    image_size: The height and width of the images in pixels.
    result: "classes" or "probabilities"; see `segment`.

    Raises ValueError or OSError like `export`, and ValueError if `onnx` is not installed.
    """
    path = _writable(output, overwrite)
    if not isinstance(directory, str):
        if len(directory) > 1:
            raise ValueError("an ONNX file holds a single network: name one workdir")
        (directory,) = directory
    if image_size is None:
        size = ",".join(map(str, files.read(directory, "config.json")["eval"]["tile_size"]))
        raise ValueError(
            "an ONNX file is for images of one size: pass --image_size=HEIGHT,WIDTH in pixels; "
            f"evaluation cuts images into tiles of {size}"
        )
    from dense_jax.inference import onnx_graph  # it needs an optional package

    loaded = trained.load(directory, checkpoint, calibration)
    about: dict[str, Any] = storage.to_json(describe(loaded, directory, license))
    facts = {name: about["dataset"][field] for name, field in FACTS.items()}
    metadata = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in (facts | about).items()
    }
    function = functools.partial(segment, loaded, result=result)
    shape = (*image_size, loaded.dataset["num_channels"])
    images = jax.ShapeDtypeStruct(shape, loaded.dataset["dtype"])
    content = onnx_graph.convert(function, images, result, metadata)
    with storage.atomic(path) as file:
        file.write(content)
    return about


def _writable(output: epath.PathLike, overwrite: bool) -> epath.Path:
    """Returns the path of the output. Raises ValueError if nothing may be written there."""
    path = epath.Path(output)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass a file as --output")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: pass --overwrite, or another --output")
    return path


def segment(
    loaded: trained.Trained, images: Num[Array, "b h w c"], result: str = "classes"
) -> Array:
    """Returns the classes or the scores of images, computed in float32 from their pixels.

    These are the results of `load` for images that fit into a tile and need no padding to the
    sizes in dataset.json. Levels are measured here, and convolutions are those of Flax.

    result: "classes", uint8 [b, h, w], or "probabilities" or "logits", float32 [b, h, w,
      num_classes]. With regions, "classes" are their masks, uint8 [b, h, w, r].
    """
    config = loaded.config.copy_and_resolve_references()
    config.model.dtype = "float32"
    regions = loaded.program.regions
    network = assemble(config, loaded.program.num_classes, regions=regions)
    levels_of = levels.rule(normalization(config.model), loaded.dataset)
    logits = batch_logits(
        loaded.variables,
        images,
        None if levels_of is None else traced_levels.measure(images, levels_of),
        model=network.model,
        normalize=network.normalize,
        resolution=config.data.resolution,
        temperature=loaded.temperature,
    )
    if result == "classes":
        return outputs.decide(logits, regions)
    return outputs.probabilities(logits, regions) if result == "probabilities" else logits


def trace(
    network: Program,
    weights: Mapping[str, Any],
    num_channels: int,
    *,
    dtype: str = "uint8",
    has_levels: bool = False,
    num_networks: int = 1,
) -> jax.export.Exported:
    """Returns a program (weights, images) -> logits that accepts any number and size of images.

    num_networks: The number of networks in `weights`; see `ensemble.network_logits`. The logits are
      those of `ensemble.pool`.

    If `has_levels`, the program is (weights, images, levels) -> logits; see `data.levels`. The
    program processes images one by one, so that logits do not depend on the number of images.
    """

    def program(weights, *images):
        variables = traverse_util.unflatten_dict(weights, sep="/")
        logits = functools.partial(
            ensemble.network_logits, logits_step=network.logits_step, num_networks=num_networks
        )
        return jax.lax.map(
            lambda image: ensemble.pool(logits(variables, *image), network.regions), images
        )

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
    step, steps: The step of the first network, and of each.
    temperature: The number by which each network's logits are divided in the program.
    thresholds: The probability above which a pixel is in a region, by name, or None for classes.
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
        "steps": loaded.steps,
        "temperature": loaded.temperature,
        "thresholds": loaded.thresholds,
        "config": config.to_dict(),
        "trained_with": environment,
        "exported_with": files.environment(),
    }


def main(argv: list[str]) -> None:
    """Exports the network and prints a summary."""
    runtime.prepare()
    args = flags.FLAGS
    if args.format != "onnx" and (args.image_size or args.result != "classes"):
        raise ValueError("--image_size and --result are for --format=onnx: pass it, too")
    if args.card:
        if args.format == "onnx":
            raise ValueError("a card holds the StableHLO file: leave --format=onnx out")
        if len(args.workdir) > 1 or args.calibration:
            raise ValueError("--card is for a single workdir, without --calibration")
        (workdir,) = args.workdir
        card.write(workdir, args.output, args.checkpoint, license=args.license, export=export)
        print(
            f"{args.output} has the card. Before `hf upload OWNER/NAME {args.output}`, read its "
            "README.md, and look whether its pictures of the data may be shared"
        )
        return
    names = ("calibration", "license", "overwrite")
    options = {name: getattr(args, name) for name in names}
    write: Any = export
    if args.format == "onnx":
        write = functools.partial(export_onnx, image_size=args.image_size, result=args.result)
    about = write(args.workdir, args.output, args.checkpoint, **options)
    print(f"{args.output} has the network of step {about['step']}; license: {about['license']}")


if __name__ == "__main__":
    command.run(main)
