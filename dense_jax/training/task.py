"""A training task built from a config: its data, its steps, and the devices they run on.

Opening a task detects invalid input before anything is written or compiled.
"""

import functools
import hashlib
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dense_jax import class_colors, data, losses, outputs, regions, storage
from dense_jax.data import balance, folds, ladder, levels, subset, targets, verify
from dense_jax.devices import cpu, distributed, mesh, tpu
from dense_jax.program import Program, assemble, normalization
from dense_jax.training import optim, replicas, steps
from dense_jax.training.augment import augment_batch
from dense_jax.training.initial import Initial, initial_weights
from dense_jax.workdir import files
from dense_jax.workdir.record import RunFolder

_LOG = logging.getLogger("dense_jax")
# The fields that may differ between processes: a local path, and fields that do not affect results.
PER_PROCESS = ("data.root", "data.workers", "data.verify")


class Training(NamedTuple):
    """The pure functions that train a config's network; see `steps`."""

    init_state: Callable[..., steps.TrainState]  # (key, initial={})
    train_step: functools.partial[tuple[steps.TrainState, dict[str, jax.Array]]]
    schedule: optax.Schedule
    loss_fn: Callable[..., jax.Array]  # (logits, class ids) -> loss, without per-pixel targets

    def shapes(self) -> steps.TrainState:
        """Returns the shapes of the training state, as jax.ShapeDtypeStructs."""
        return jax.eval_shape(self.init_state, jax.random.key(0))


def bind(
    config: ConfigDict,
    program: Program,
    num_channels: int,
    class_weights: Sequence[float] | None = None,
    fields: Sequence[data.Field] = (),
) -> Training:
    """Returns functions that train `program` with a config's optimizer, loss and augmentation.

    class_weights: One weight per class or region, as computed from loss_options.class_weights, or
      None.
    fields: The per-pixel targets of the examples, which are passed to the loss.
    """
    heads = config.model.auxiliary
    schedule = optim.make_schedule(
        config.optimizer.schedule,
        config.optimizer.learning_rate,
        warmup_steps=config.optimizer.warmup_steps,
        num_steps=config.num_steps,
    )
    tx = optim.make_optimizer(
        config.optimizer.name,
        schedule,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
        grad_clip_norm=config.optimizer.grad_clip_norm,
        encoder_lr_multiplier=config.optimizer.encoder_lr_multiplier,
        freeze_encoder=config.model.freeze_encoder,
    )
    options = config.loss_options.to_dict() | {"class_weights": class_weights}
    terms = losses.terms(config.loss)
    init_state = functools.partial(
        steps.init_state,
        init=functools.partial(program.init, num_channels=num_channels),
        tx=tx,
        with_ema=config.ema_decay > 0,
    )
    random_crops = functools.partial(
        augment_batch,
        num_classes=program.num_classes,
        crop_size=config.data.crop_size,
        context=program.model.context,
        resolution=config.data.resolution,
        fields=tuple(fields),
        clip=normalization(config.model) not in levels.MEASURED,
        **config.augment.to_dict(),
    )
    train_step = functools.partial(
        cpu.fast(steps.train_step),
        model=program.inner_model,
        tx=tx,
        loss_fn=_of_labels(losses.total(terms, options, [f.name for f in fields]), program),
        augment=random_crops,
        normalize=program.normalize,
        ema_decay=config.ema_decay,
        auxiliary=dict(zip(heads.strides or (), heads.weights or (), strict=True)),
        num_microbatches=config.num_microbatches,
    )
    loss_fn = _of_labels(losses.total(terms, options), program)
    return Training(init_state, train_step, schedule, loss_fn)


def _of_labels(loss_fn: Callable[..., jax.Array], program: Program) -> Callable[..., jax.Array]:
    """Returns a loss as a function of class ids instead of what `outputs.targets` returns."""

    def loss_of_labels(logits: jax.Array, label: jax.Array, **fields: jax.Array) -> jax.Array:
        return loss_fn(logits, outputs.targets(label, program.regions), **fields)

    return loss_of_labels


class Placed(NamedTuple):
    """The jitted training step for all seeds, with the shapes and shardings of its arguments.

    mesh: A mesh of all devices, with one replica per seed.
    shardings: A TrainState of shardings over all devices, used to save, restore and evaluate the
      state of one seed.
    train_step: (states, batch, keys, resident) -> (states, metrics). The input states are donated.
    arguments: The shapes of states, batch and keys, with their shardings.
    """

    mesh: Mesh
    shardings: steps.TrainState
    train_step: Any
    arguments: tuple[Any, Any, Any]


def place(
    config: ConfigDict,
    training: Training,
    batch_shapes: Mapping[str, jax.ShapeDtypeStruct],
    on: Sequence[jax.Device] | None = None,
) -> Placed:
    """Jits the training step for all seeds, with shardings for its arguments.

    batch_shapes: The shapes of one seed's batch.
    on: The devices to run on; by default, all devices.
    """
    all_devices, devices = mesh.make_mesh(1, on), mesh.make_mesh(config.num_seeds, on)
    whole = mesh.replicated(all_devices)
    shapes = training.shapes()
    shardings = jax.tree.map(lambda _: whole, shapes)
    if config.optimizer.sharded:
        shardings = shardings.replace(opt_state=mesh.spread(shapes.opt_state, all_devices))
    arguments = (
        replicas.stacked_shapes(mesh.placed(shapes, shardings), devices),
        replicas.batch_shapes(batch_shapes, devices),
        replicas.stacked_shapes(mesh.placed(jax.eval_shape(jax.random.key, 0), whole), devices),
    )
    states, keys = (replicas.stacked_shardings(x, devices) for x in (shardings, whole))
    step = training.train_step
    if devices.devices.flat[0].platform == "tpu":
        step = functools.partial(step, model=tpu.InPairs(step.keywords["model"]))
    train_step = jax.jit(
        replicas.side_by_side(step, devices),
        in_shardings=(states, mesh.sharded(devices), keys, mesh.replicated(devices)),
        out_shardings=(states, mesh.replicated(devices)),
        donate_argnums=0,
    )
    return Placed(devices, shardings, train_step, arguments)


def needs_distances(config: ConfigDict) -> bool:
    """Returns whether a config's loss needs the signed distances to the classes' boundaries."""
    return any("distances" in term.fields for term in losses.terms(config.loss))


def target_fields(config: ConfigDict, num_classes: int) -> tuple[data.Field, ...]:
    """Returns the per-pixel targets that a config's loss needs in addition to the labels.

    num_classes: The number of classes or regions.
    """
    border = (targets.BORDER,) if config.border.weight > 0 else ()
    return (*border, targets.distances_field(num_classes)) if needs_distances(config) else border


def batch_shapes(
    config: ConfigDict,
    canvas: Sequence[int],
    num_channels: int,
    fields: Sequence[data.Field] = (),
    dtype: str = "uint8",
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one seed's training batch, for all hosts together."""
    b = config.batch_size
    has_levels = levels.are_needed(normalization(config.model), dtype)
    level_shapes = {"levels": jax.ShapeDtypeStruct((b, 2, num_channels), "float32")}
    return {
        "image": jax.ShapeDtypeStruct((b, *canvas, num_channels), dtype),
        "label": jax.ShapeDtypeStruct((b, *canvas), "uint8"),
        "size": jax.ShapeDtypeStruct((b, 2), "int32"),
        "index": jax.ShapeDtypeStruct((b,), "uint32"),
        **{f.name: jax.ShapeDtypeStruct((b, *canvas, *f.shape), f.dtype) for f in fields},
        **(level_shapes if has_levels else {}),
    }


class Task(NamedTuple):
    """The opened data of a config, with the functions that train and evaluate its network.

    source: The training split, with the additional per-pixel targets that the loss needs, and with
      the levels of images that have them.
    eval_source: The evaluation split, or the images of it that eval.num_images leaves, without
      levels.
    levels_of: How the levels of images are found, or None.
    dataset: The content of dataset.json.
    repeats: How often an image is drawn relative to others, or None if all are drawn equally often.
    canvas: The height and width, in pixels, to which every training image is padded or cropped.
    initial: The weights to start from, or None if a run was already started in the workdir.
    """

    source: data.Examples
    eval_source: data.Source
    levels_of: levels.Rule | None
    dataset: dict[str, Any]
    repeats: np.ndarray | None
    canvas: tuple[int, ...]
    batch_shapes: dict[str, jax.ShapeDtypeStruct]
    program: Program
    training: Training
    placed: Placed
    initial: Initial | None


def open_task(config: ConfigDict, folders: Sequence[RunFolder]) -> Task:
    """Opens the data of a config and builds the training and evaluation steps.

    Raises ValueError if the data or the config cannot be used for training, if a run was started
    with different data, or if the processes have different data or weights.
    """
    mesh.check_shares(config.num_seeds, config.batch_size, config.num_microbatches)
    _LOG.info("opening the data")
    source, eval_source = folds.open_splits(config.data)
    dataset, name = describe(source, eval_source), normalization(config.model)
    dataset["levels"] = levels.of_split(source).tolist() if name == "dataset" else None
    levels_of = levels.rule(name, dataset)
    for folder in folders:
        files.compare_dataset(folder.path, dataset, config.data.root)
    train_source: data.Examples = source
    if config.border.weight > 0:
        train_source = targets.with_border_weights(source, **config.border.to_dict())
    if needs_distances(config):
        train_source = targets.with_distances(train_source, source.num_classes, source.regions)
    train_source = levels.with_levels(train_source, levels_of)
    class_weights = config.loss_options.class_weights
    if isinstance(class_weights, str):
        class_weights = balance.class_weights(class_weights, source)
        pairs = zip(source.class_names, class_weights, strict=True)
        _LOG.info("class weights: %s", ", ".join(f"{name} {w:.4g}" for name, w in pairs))
    repeats = None
    if config.data.repeat_threshold > 0:
        repeats = balance.repeat_factors(balance.class_counts(source), config.data.repeat_threshold)
        _LOG.info("%.0f %% of the images are drawn more often", 100 * np.mean(repeats > 1))
    _LOG.info("building the network and tracing its training step")
    program = assemble(config, source.num_classes, regions=source.regions)
    fields = train_source.fields
    training = bind(config, program, source.num_channels, class_weights, fields)
    canvas = config.data.canvas_size or tuple(source.sizes.max(axis=0).tolist())
    shapes = batch_shapes(config, canvas, source.num_channels, fields, source.dtype)
    placed = place(config, training, shapes)
    # Detects errors by tracing. With the final shardings, no second trace is needed later.
    placed.train_step.eval_shape(*placed.arguments, {})
    begun = any(folder.is_begun for folder in folders)
    initial = None if begun else initial_weights(config, program, dataset)
    arrays = initial.arrays.values() if initial else ()
    distributed.agree(
        lambda: (
            _facts_of_split(config.data.train_split, source)
            | _facts_of_split(folds.eval_split(config.data), eval_source)
            | {"the initial weights": _digest(array.tobytes() for array in arrays)}
        )
    )
    if config.data.verify:
        _verify(config, source, eval_source)
    if config.eval.num_images is not None and config.eval.num_images < len(eval_source):
        eval_source = subset.evenly_spaced(eval_source, config.eval.num_images)
    return Task(
        *(train_source, eval_source, levels_of, dataset, repeats, canvas, shapes),
        *(program, training, placed, initial),
    )


def _verify(config: ConfigDict, source: data.Source, eval_source: data.Source) -> None:
    """Verifies both splits. Warns of classes of the evaluation split that cannot be learned."""
    learned = verify.verify(source)
    train_split, eval_split = config.data.train_split, folds.eval_split(config.data)
    for name in verify.verify(eval_source):
        if name not in learned:
            _LOG.warning(
                f"class {name!r} is in {eval_split}, but not in {train_split}, so it cannot be learned"
            )
    if source.fingerprint is not None:
        _LOG.info(
            "every image of %s and %s can be read; python -m dense_jax.data.doctor checks more",
            *(train_split, eval_split),
        )


def describe(source: Any, eval_source: Any) -> dict[str, Any]:
    """Returns the content of dataset.json: everything needed to use the model without the data.

    `open_task` adds the levels of the training split.
    """
    return {
        "class_names": source.class_names,
        "num_channels": source.num_channels,
        "dtype": source.dtype,
        "values": source.values,
        "value_range": source.value_range,
        "palette": class_colors.palette_of(source),
        "regions": regions.declaration(source),
        "num_examples": len(source),
        "ladder": ladder.choose(np.concatenate([source.sizes, eval_source.sizes])),
        # All folds share the fingerprint of the split. `eval_fingerprint` tells them apart.
        "fingerprint": source.split.fingerprint,
        "eval_fingerprint": eval_source.fingerprint,
    }


def facts(config: ConfigDict, folders: Sequence[RunFolder]) -> dict[str, Any]:
    """Returns {name: value} for all that processes must agree on, such as versions and options."""
    package = sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))
    fields = files.flatten(config.to_dict())
    return storage.to_json(
        files.environment()["versions"]
        | {"the code of dense_jax": _digest(file.read_bytes() for file in package)}
        | {"the number of devices": jax.local_device_count()}
        | {name: value for name, value in fields.items() if name not in PER_PROCESS}
        | {"the content of --workdir": [folder.contents for folder in folders]}
    )


def _facts_of_split(split: str, source: Any) -> dict[str, Any]:
    content = describe(source, source)
    return storage.to_json({f"{name} of the {split} images": v for name, v in content.items()})


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]
