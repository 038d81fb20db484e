"""The weights that a run starts from: published ones of its encoder."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import traverse_util
from ml_collections import ConfigDict

from dense_jax.models import pretrained
from dense_jax.program import Program


class Initial(NamedTuple):
    """The weights that replace randomly initialized ones.

    arrays: The weights by their path, such as "params/encoder/conv1/conv/kernel".
    origin: Where they come from, as environment.json has it: the `source`, `sha256` and `license`.
    """

    arrays: Mapping[str, Any] = {}
    origin: Mapping[str, Any] | None = None


def initial_weights(config: ConfigDict, program: Program, dataset: Mapping[str, Any]) -> Initial:
    """Returns the weights to start from. Without model.pretrained, there are none.

    dataset: The content of dataset.json.

    Raises ValueError if the weights are missing or unreadable, or do not fit the network.
    """
    model = config.model
    if not model.pretrained:
        return Initial()
    shapes = program.variables(dataset["num_channels"])
    shapes = {name: values["encoder"] for name, values in shapes.items() if values}
    variables, origin = pretrained.load(model.pretrained, model.encoder, model.norm, shapes)
    named = {collection: {"encoder": values} for collection, values in variables.items()}
    return Initial(traverse_util.flatten_dict(named, sep="/"), origin)
