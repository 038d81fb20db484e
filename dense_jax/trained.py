"""A workdir's trained network."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dense_jax.devices import mesh
from dense_jax.program import Run, assemble, placed
from dense_jax.workdir import checkpoint
from dense_jax.workdir import files as workdir


class Loaded(NamedTuple):
    """A trained run."""

    config: ConfigDict
    dataset: Mapping[str, Any]  # dataset.json
    run: Run
    step: int
    variables: Any
    mesh: Mesh


def load(directory: str, which: str) -> Loaded:
    """Restores a run's model.

    which: "best" (by eval/mean_iou), "latest", or a step. Raises ValueError if there is no such
    checkpoint, listing those there are.
    """
    path = epath.Path(directory).resolve()
    config = ConfigDict(workdir.read(path, "config.json"))
    dataset = workdir.read(path, "dataset.json")
    run = assemble(config, len(dataset["class_names"]), dataset["num_channels"])
    saved = {
        name: checkpoint.Checkpoints(path / "checkpoints" / name) for name in ("best", "latest")
    }
    named = {name: max(each.steps) for name, each in saved.items() if each.steps}
    wanted = named.get(which) if which in saved else int(which) if which.isdigit() else None
    holder = next((each for each in saved.values() if wanted in each.steps), None)
    if wanted is None or holder is None:
        steps_there = sorted({step for each in saved.values() for step in each.steps})
        raise ValueError(
            f"no checkpoint {which!r} in {path / 'checkpoints'}: it must be best, latest or one of "
            f"the steps {steps_there}"
        )
    devices = mesh.make_mesh()
    state = holder.restore(wanted, placed(run.shapes(), mesh.replicated(devices)))
    return Loaded(config, dataset, run, wanted, state.variables(), devices)
