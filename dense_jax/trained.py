"""Loads the trained network of a workdir, or those of several workdirs as an ensemble."""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dense_jax import regions, storage
from dense_jax.devices import mesh
from dense_jax.program import Program, Variables, assemble
from dense_jax.workdir import files
from dense_jax.workdir.checkpoint import Checkpoints

# The options that the networks of an ensemble must share, besides config.model.
_SHARED = ("class_names", "num_channels", "dtype", "value_range", "levels")


class Trained(NamedTuple):
    """A network with its weights, or an ensemble of networks that differ in their weights alone.

    In an ensemble, the class probabilities are the mean of the networks'; see `inference.ensemble`.
    """

    config: ConfigDict  # of the first network, as the dataset
    dataset: Mapping[str, Any]  # the content of dataset.json
    program: Program  # of a single network
    steps: tuple[int, ...]  # of each network's checkpoint
    # Without auxiliary heads, replicated on every device of the mesh. Those of several networks are
    # stacked along a new first axis.
    variables: Variables
    mesh: Mesh
    temperature: float = 1.0

    @property
    def step(self) -> int:
        """Returns the step of the first network's checkpoint."""
        return self.steps[0]

    @property
    def thresholds(self) -> dict[str, float] | None:
        """Returns the threshold of each region, or None for classes."""
        if (own := self.program.regions) is None:
            return None
        return dict(zip(own.names, own.thresholds, strict=True))

    @property
    def fingerprint(self) -> str:
        """Returns 16 hexadecimal digits that identify the weights, in any order of the networks."""
        arrays = list(map(np.asarray, jax.tree.leaves(self.variables)))
        if len(self.steps) == 1:
            arrays = [array[None] for array in arrays]
        networks = sorted(
            hashlib.sha256(b"".join(array[k].tobytes() for array in arrays)).hexdigest()
            for k in range(len(self.steps))
        )
        return hashlib.sha256("".join(networks).encode()).hexdigest()[:16]


def load(
    directory: epath.PathLike | Sequence[epath.PathLike],
    which: str,
    calibration: epath.PathLike | None = None,
) -> Trained:
    """Loads the trained network from a workdir, without the optimizer's state.

    directory: A workdir, or the workdirs of an ensemble.
    which: The checkpoint: "best" (highest eval/mean_iou), "latest", or a step.
    calibration: The calibration.json that `dense_jax.evaluate` wrote for these checkpoints. Each
      network's logits are then divided by its temperature, and regions have its thresholds.

    Raises ValueError, listing the saved steps, if the checkpoint does not exist, if the networks of
    an ensemble differ in more than their weights, or if the calibration is that of other weights.
    """
    is_single = isinstance(directory, str) or not isinstance(directory, Sequence)
    paths = [storage.absolute(path) for path in ([directory] if is_single else directory)]
    fitted: dict[str, Any] = {"temperature": 1.0, "thresholds": None}
    if calibration:
        fitted = read_calibration(calibration)
    configs = [ConfigDict(files.read(path, "config.json")) for path in paths]
    datasets = [files.read(path, "dataset.json") for path in paths]
    _check_alike(paths, configs, datasets)
    # The dataset.json of runs from before there were regions does not have the field.
    config, dataset = configs[0], {"regions": None} | datasets[0]
    program = assemble(
        config,
        len(dataset["class_names"]),
        fitted["temperature"],
        regions.read(dataset["class_names"], dataset["regions"], fitted["thresholds"]),
    )
    devices = mesh.make_mesh()
    shapes = {
        collection: {name: values for name, values in tree.items() if name != "auxiliary"}
        for collection, tree in program.variables(dataset["num_channels"]).items()
    }
    shapes = mesh.placed({"batch_stats": {}, **shapes}, mesh.replicated(devices))
    networks = [
        _restore(path, which, {"ema": shapes} if own.ema_decay else shapes)
        for path, own in zip(paths, configs, strict=True)
    ]
    steps, variables = zip(*networks, strict=True)
    stacked = variables[0]
    if len(paths) > 1:
        stack = jax.jit(
            lambda *networks: jax.tree.map(lambda *arrays: jnp.stack(arrays), *networks),
            out_shardings=mesh.replicated(devices),
        )
        stacked = stack(*variables)
    trained = Trained(config, dataset, program, steps, stacked, devices, fitted["temperature"])
    if calibration and fitted["fingerprint"] != trained.fingerprint:
        there, here = (", ".join(map(str, x)) for x in (fitted["steps"], steps))
        raise ValueError(
            f"{calibration} is the calibration of other weights (step {there}; here step {here}): "
            "calibrate these with dense_jax.evaluate --calibrate"
        )
    return trained


def _restore(path: epath.Path, which: str, like: Any) -> tuple[int, Variables]:
    """Returns the step of a workdir's checkpoint, and its variables."""
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
    state = holder.restore(step, like)
    return step, state.get("ema", state)


def _check_alike(
    paths: Sequence[epath.Path], configs: Sequence[ConfigDict], datasets: Sequence[Mapping]
) -> None:
    """Raises ValueError if networks differ in more than their weights, or one is there twice."""
    if len(set(paths)) < len(paths):
        raise ValueError(f"a workdir is named twice: {', '.join(map(str, paths))}")
    first, *others = (
        files.flatten(
            {
                "config.model": config.model.to_dict() | {"initialize_from": None},
                "config.data.resolution": config.data.resolution,
                "dataset": {name: dataset.get(name) for name in _SHARED},
                "regions": regions.in_order(dataset.get("regions")),
            }
        )
        for config, dataset in zip(configs, datasets, strict=True)
    )
    for path, other in zip(paths[1:], others, strict=True):
        if different := files.differing_fields([first, other]):
            raise ValueError(
                f"{path} and {paths[0]} cannot be one ensemble: they differ in "
                f"{', '.join(different)}"
            )


def read_calibration(path: epath.PathLike) -> dict[str, Any]:
    """Reads a calibration.json. Raises ValueError if it is missing or damaged."""
    if not epath.Path(path).is_file():
        raise ValueError(f"{path} is missing: dense_jax.evaluate --calibrate writes it")
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        fitted = json.loads(epath.Path(path).read_text())
        thresholds = fitted.setdefault("thresholds", None) or {}
        is_valid = fitted["temperature"] > 0 and all(0 < t < 1 for t in thresholds.values())
        if is_valid and fitted["steps"] and fitted["fingerprint"]:
            return fitted
    raise ValueError(f"{path} is no calibration.json of dense_jax.evaluate --calibrate, or damaged")
