"""Loads the trained network of a workdir."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dense_jax import storage
from dense_jax.devices import mesh
from dense_jax.program import Program, Variables, assemble
from dense_jax.workdir import files
from dense_jax.workdir.checkpoint import Checkpoints


class Trained(NamedTuple):
    """A network with its weights."""

    config: ConfigDict
    dataset: Mapping[str, Any]  # the content of dataset.json
    program: Program
    step: int
    variables: Variables  # without auxiliary heads, replicated on every device of the mesh
    mesh: Mesh


def load(directory: epath.PathLike, which: str) -> Trained:
    """Loads the trained network from a workdir, without the optimizer's state.

    which: The checkpoint: "best" (highest eval/mean_iou), "latest", or a step.

    Raises ValueError, listing the saved steps, if the checkpoint does not exist.
    """
    path = storage.absolute(directory)
    config = ConfigDict(files.read(path, "config.json"))
    dataset = files.read(path, "dataset.json")
    program = assemble(config, len(dataset["class_names"]))
    # A missing folder is left out, because opening it would create it.
    folders = [path / "checkpoints" / name for name in ("best", "latest")]
    saved = {folder.name: Checkpoints(folder) for folder in folders if folder.is_dir()}
    newest = {name: max(checkpoints.steps, default=None) for name, checkpoints in saved.items()}
    step = newest[which] if which in saved else int(which) if which.isdigit() else None
    holder = next(
        (checkpoints for checkpoints in saved.values() if step in checkpoints.steps), None
    )
    if step is None or holder is None:
        steps = sorted({step for checkpoints in saved.values() for step in checkpoints.steps})
        raise ValueError(
            f"no checkpoint {which!r} in {path / 'checkpoints'}: it must be best, latest or one of "
            f"the steps {steps}"
        )
    devices = mesh.make_mesh()
    shapes = {
        collection: {name: values for name, values in tree.items() if name != "auxiliary"}
        for collection, tree in program.variables(dataset["num_channels"]).items()
    }
    shapes = mesh.placed({"batch_stats": {}, **shapes}, mesh.replicated(devices))
    state = holder.restore(step, {"ema": shapes} if config.ema_decay else shapes)
    return Trained(config, dataset, program, step, state.get("ema", state), devices)
