"""The weights that a run starts from: published encoder weights, or a trained network's weights."""

import itertools
import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from dense_jax import regions, storage, trained
from dense_jax.inference import exported
from dense_jax.models import pretrained, weight_files
from dense_jax.program import Program, assemble, normalization
from dense_jax.workdir import files

_LOG = logging.getLogger("dense_jax")
OPTION = "model.initialize_from"


class Initial(NamedTuple):
    """The weights that replace randomly initialized ones.

    arrays: The weights by their path, such as "params/encoder/conv1/conv/kernel".
    origin: Facts about the weights, such as `source` and `license`, for environment.json.
    """

    arrays: Mapping[str, Any] = {}
    origin: Mapping[str, Any] | None = None


def initial_weights(config: ConfigDict, program: Program, dataset: Mapping[str, Any]) -> Initial:
    """Returns the weights that model.pretrained or model.initialize_from selects.

    If neither is set, returns an empty `Initial`.

    dataset: The content of dataset.json.

    Raises ValueError if the weights are missing or unreadable, or do not fit the network.
    """
    model = config.model
    if model.initialize_from:
        return _of_network(config, program, dataset)
    if not model.pretrained:
        return Initial()
    shapes = program.variables(dataset["num_channels"])
    shapes = {name: values["encoder"] for name, values in shapes.items() if values}
    variables, origin = pretrained.load(model.pretrained, model.encoder, model.norm, shapes)
    named = {collection: {"encoder": values} for collection, values in variables.items()}
    return Initial(traverse_util.flatten_dict(named, sep="/"), origin)


def _of_network(config: ConfigDict, program: Program, dataset: Mapping[str, Any]) -> Initial:
    """Returns those weights of a trained network whose path and shape also occur in `program`.

    If the class names or regions differ, leaves out weights whose shape depends on their number.
    """
    network = _read(config.model.initialize_from)
    source = f"{OPTION}={network.origin['source']!r}"
    theirs, ours = network.normalization, normalization(config.model)
    if theirs != ours and not config.model.normalization:
        raise ValueError(
            f"{source} was trained on images normalized by {theirs!r}, but this run has {ours!r}: "
            f"pass --config.model.normalization={theirs}"
        )
    shapes, heads = _shapes(program, dataset), set()
    if network.outputs != _outputs(dataset):
        other = _shapes(assemble(config, program.model.decoder.num_classes + 1), dataset)
        heads = {name for name in shapes if shapes[name] != other[name]}
    arrays = network.arrays
    taken = {
        name: array
        for name, array in arrays.items()
        if name not in heads and array.shape == shapes.get(name)
    }
    if not any(name.startswith("params/encoder/") for name in taken):
        raise ValueError(
            f"{source}: nothing of its encoder fits this run's model.encoder="
            f"{config.model.encoder!r}; set the model.* options that it was trained with"
        )
    fits = {
        "taken": _branches(taken, (shapes.keys() | arrays.keys()) - taken.keys()),
        "anew": _branches(shapes.keys() - taken.keys(), taken),
        "left_over": _branches(arrays.keys() - shapes.keys(), shapes),
    }
    for what, names in fits.items():
        _LOG.info("%s: %s: %s", source, what.replace("_", " "), ", ".join(names) or "nothing")
    return Initial(taken, {**network.origin, **fits})


def _shapes(program: Program, dataset: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    variables = program.variables(dataset["num_channels"])
    leaves: Any = traverse_util.flatten_dict(variables, sep="/")
    return {name: leaf.shape for name, leaf in leaves.items()}


def _branches(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Returns the shortest path prefixes that cover all of `names` and none of `others`.

    `names` and `others` are paths such as "params/encoder/conv1/conv/kernel". A prefix such as
    "params/encoder" covers all paths below it.
    """

    def prefixes(name: str) -> Iterable[str]:
        return itertools.accumulate(name.split("/"), "{}/{}".format)

    divided = {prefix for name in others for prefix in prefixes(name)}
    return sorted({next((p for p in prefixes(name) if p not in divided), name) for name in names})


class _Network(NamedTuple):
    """A trained network.

    arrays: The weights by their path.
    normalization: The name of the input normalization.
    outputs: See `_outputs`.
    """

    arrays: dict[str, np.ndarray]
    normalization: str
    outputs: Any
    origin: dict[str, Any]


def _outputs(dataset: Mapping[str, Any]) -> tuple[list[str], Any]:
    """Returns the names of the classes and the regions, in the order of a network's logits."""
    return list(dataset["class_names"]), regions.in_order(dataset.get("regions"))


def _read(source: str) -> _Network:
    """Returns the network of a workdir (the best checkpoint) or of an exported model."""
    # epath would take hf:// for a folder on the network.
    is_found = source.partition("://")[0] in weight_files.FINDERS
    is_found = is_found or not storage.absolute(source).is_dir()
    path: Any = weight_files.find(source, OPTION) if is_found else storage.absolute(source)
    if not path.is_dir():
        about, arrays = exported.read_weights(path)
        if len(about["steps"]) > 1:
            raise ValueError(f"{OPTION}={source!r} is an ensemble: name a single network")
        origin = {"source": source, "sha256": weight_files.sha256(path)}
        origin |= {name: about.get(name) for name in ("license", "step")}
        origin["initial_weights"] = about["trained_with"].get("initial_weights")
        return _Network(arrays, about["normalization"], _outputs(about["dataset"]), origin)
    try:
        network = trained.load(path, "best")
        environment = files.read(path, "environment.json")
    except ValueError as error:
        raise ValueError(f"{OPTION}={source!r}: {error}") from error
    variables: Any = network.variables
    arrays = traverse_util.flatten_dict(variables, sep="/")
    origin = {"source": files.absolute(source), "step": network.step}
    origin |= {name: environment.get(name) for name in ("license", "initial_weights")}
    return _Network(
        {name: np.asarray(array) for name, array in arrays.items()},
        normalization(network.config.model),
        _outputs(network.dataset),
        origin,
    )
