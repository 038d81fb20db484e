"""Reads exported models, which `dense_jax.export` writes, without Flax or the model code.

An exported model is an uncompressed zip archive of
  model.json           the description of the model; see `export.describe`
  program.bin          StableHLO serialized by jax.export: (weights, image [b, h, w, c]) ->
                       logits float32 [b, h, w, num_classes], for any b, h and w. If images have
                       levels (see `data.levels`), a third argument is float32 [b, 2, c]. With
                       regions, there is a logit for each region instead of each class.
  weights.safetensors  the weights, named by their paths: "params/encoder/..."
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import operator
import zipfile
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax import export
from safetensors import numpy as safetensors

from dense_jax import regions, storage
from dense_jax.data import levels
from dense_jax.inference import ensemble
from dense_jax.inference.tta import LogitsStep

_LOG = logging.getLogger("dense_jax")
FORMAT = "dense_jax model"
DAMAGED = "{} is damaged, or no file of dense_jax.export"
VERSION = 1  # the file format's version, increased if older readers cannot read new files


def _integer(least: int, most: int = 2**31 - 1) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _list(is_item: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    """Returns a predicate that is true for a list of `length` items that all satisfy `is_item`.

    If `length` is None, the list may have any length > 0.
    """
    return lambda value: (
        isinstance(value, list)
        and (len(value) == length if length else len(value) > 0)
        and all(map(is_item, value))
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_range(value: Any) -> bool:
    are_two_numbers = _list(_is_number, 2)(value)
    return value is None or (are_two_numbers and value[0] < value[1])


# The dotted paths of the fields of model.json that code relies on, with a predicate for each value.
# The other fields are informational.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "dataset.class_names": _list(_is_text),
    "normalization": _is_text,
    "trained_with": lambda value: isinstance(value, dict),
    "dataset.palette": _list(_list(_integer(0, 255), 3)),
    "dataset.num_channels": _integer(1),
    "dataset.dtype": lambda value: value in ("uint8", "uint16", "float32"),
    "dataset.levels": lambda value: value is None or _list(_list(_is_number), 2)(value),
    "dataset.value_range": _is_range,
    "dataset.ladder": _list(_list(_integer(1), 2)),
    "context": _integer(0),
    "tile_size": _list(_integer(1), 2),
    "margin": _integer(0),
    "batch_size": _integer(1, 2**16),  # this many tiles are in memory at once
    "step": _integer(0),
    "steps": _list(_integer(0)),
    "temperature": lambda value: _is_number(value) and value > 0,
    "config.model.name": _is_text,
    "config.model.encoder": _is_text,
    "program_sha256": _is_text,
    "exported_with.versions.jax": _is_text,
}


class Exported(NamedTuple):
    """The contents of an exported model. `about` is the parsed model.json."""

    about: Mapping[str, Any]
    logits_step: LogitsStep
    variables: dict[str, Any]


def read(path: epath.PathLike) -> Exported:
    """Reads an exported model. If this JAX cannot run its program, builds the network anew.

    JAX promises to read programs for six months. The config and the weights in the file last as
    long as this package builds the same network from them.

    Raises ValueError if the file is missing, damaged, not an exported model, or of an unknown
    version.
    """
    about, serialized, weights = _read_members(epath.Path(path))
    try:
        program = export.deserialize(bytearray(serialized))
        program.mlir_module()  # fails if JAX no longer accepts the program
    except Exception as error:  # noqa: BLE001 (it may be of any type)
        version = about["exported_with"]["versions"]["jax"]
        unreadable = f"{path} was written by jax {version}, and this jax cannot read it"
        with _explaining(f"{unreadable}, nor can its network be built anew"):
            logits_step = _rebuilt(about, weights)
        reason = " ".join(str(error).split())[:100]
        _LOG.warning("%s (%s): built anew from its config and weights", unreadable, reason)
        return Exported(about, logits_step, weights)
    with _explaining(DAMAGED.format(path)):
        _check_program(program, about, weights)

    def logits_step(variables, /, *image):
        return program.call(variables, *(array[None] for array in image))[0]

    return Exported(about, logits_step, weights)


def _rebuilt(about: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> LogitsStep:
    """Returns the logits_step of the network that the config in model.json describes.

    Raises ValueError if its weights are not those in the file.
    """
    from flax import traverse_util
    from ml_collections import ConfigDict

    from dense_jax import program  # imports Flax, which readable programs do not need

    dataset = about["dataset"]
    num_classes, num_networks = len(dataset["class_names"]), len(about["steps"])
    own = regions_of(about)
    network = program.assemble(ConfigDict(about["config"]), num_classes, about["temperature"], own)
    stacked = (num_networks,) if num_networks > 1 else ()
    shapes: Any = traverse_util.flatten_dict(network.variables(dataset["num_channels"]), sep="/")
    needed = {
        name: jax.ShapeDtypeStruct((*stacked, *x.shape), x.dtype)
        for name, x in shapes.items()
        if name.split("/")[1] != "auxiliary"
    }
    _check_weights(weights, needed)

    def logits_step(variables, /, *image):
        networks = traverse_util.unflatten_dict(variables, sep="/")
        how = {"logits_step": network.logits_step, "num_networks": num_networks}
        return ensemble.pool(ensemble.network_logits(networks, *image, **how), own)

    return logits_step


def regions_of(about: Mapping[str, Any]) -> regions.Regions | None:
    """Returns the regions that model.json describes. Raises ValueError if they are wrong."""
    dataset = about["dataset"]
    return regions.read(dataset["class_names"], dataset.get("regions"), about.get("thresholds"))


def read_weights(path: epath.PathLike) -> tuple[Mapping[str, Any], dict[str, np.ndarray]]:
    """Reads the parsed model.json and the weights of an exported model, without its program.

    Raises ValueError like `read`.
    """
    about, _, weights = _read_members(epath.Path(path))
    return about, weights


def _read_members(path: epath.Path) -> tuple[Mapping[str, Any], bytes, dict[str, np.ndarray]]:
    """Returns the parsed model.json, the serialized program and the weights of an exported model."""
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: it must be a workdir or a file of dense_jax.export"
        )
    with path.open("rb") as file:
        with _explaining(DAMAGED.format(path)):
            archive = zipfile.ZipFile(file)
            about = json.loads(_member(archive, "model.json"))
            if (name := _field(about, "format")) != FORMAT:
                raise ValueError(f"its format is {name!r}")
        storage.check_format(path, about, VERSION)
        with _explaining(DAMAGED.format(path)):
            _check_fields(about)
            serialized = _member(archive, "program.bin")
            # JAX may crash when it deserializes a damaged program.
            if hashlib.sha256(serialized).hexdigest() != about["program_sha256"]:
                raise ValueError("its program.bin is not the one that was exported")
            weights = safetensors.load(_member(archive, "weights.safetensors"))
    return about, serialized, weights


@contextlib.contextmanager
def _explaining(message: str) -> Generator[None]:
    """Converts an exception in the `with` block to a ValueError that starts with `message`.

    Catches exceptions of any type, because parsers raise many types.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{message}: {' '.join(str(error).split())}") from error


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Returns the bytes of an archive member. Refuses compressed members, which could be huge."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its {name} is compressed")
    return archive.read(name)


def _field(about: Any, name: str) -> Any:
    try:
        return functools.reduce(operator.getitem, name.split("."), about)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its model.json has no {name}") from error


def _check_fields(about: Any) -> None:
    """Raises ValueError if a field of model.json is missing or has an invalid value."""
    for name, is_valid in _FIELDS.items():
        if not is_valid(value := _field(about, name)):
            raise ValueError(f"{name} in its model.json is {value!r}")
    if len(about["dataset"]["palette"]) != len(about["dataset"]["class_names"]):
        raise ValueError("its model.json has another number of colors than of classes")
    regions_of(about)


def _check_program(
    program: export.Exported, about: Mapping[str, Any], weights: Mapping[str, np.ndarray]
) -> None:
    """Raises ValueError if program, weights and model.json disagree or a weight is not finite."""
    (needed, *_), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    _check_weights(weights, needed)
    length, dataset = 2 * about["context"] + 1, about["dataset"]
    c, dtype = dataset["num_channels"], dataset["dtype"]
    arguments = [jax.ShapeDtypeStruct((1, length, length, c), dtype)]
    if levels.are_needed(about["normalization"], dtype):
        levels.rule(about["normalization"], dataset)  # raises if the levels are missing
        arguments.append(jax.ShapeDtypeStruct((1, 2, c), np.float32))
    outputs = dataset.get("regions") or dataset["class_names"]
    shape = (1, length, length, len(outputs))
    if (logits := jax.eval_shape(program.call, weights, *arguments)).shape != shape:
        raise ValueError(f"its program returns logits {logits.shape}, not {shape}")


def _check_weights(weights: Mapping[str, np.ndarray], needed: Mapping[str, Any]) -> None:
    """Raises ValueError if weights differ from `needed` in shape or type, or are not finite."""
    shapes, needed_shapes = (
        {name: (array.shape, array.dtype) for name, array in arrays.items()}
        for arrays in (weights, needed)
    )
    names = sorted(shapes.keys() | needed_shapes.keys())
    if wrong := [name for name in names if shapes.get(name) != needed_shapes.get(name)]:
        raise ValueError(f"its weights are not those of its program: {', '.join(wrong[:3])}")
    if wrong := [name for name in names if not np.isfinite(weights[name]).all()]:
        raise ValueError(f"its weights are not finite: {', '.join(wrong[:3])}")
