"""From a config to the functions of its run, compiled and placed.

`assemble` makes the pure functions of `steps` from model, loss, augmentation and optimizer;
`jit_train_step` and `jit_eval_step` place them on a mesh.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dense_jax import losses, metrics, models
from dense_jax.devices import cpu, mesh
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.normalization import NORMALIZATIONS
from dense_jax.training import device_cache, optim, steps
from dense_jax.training.augment import make_augment


class Run(NamedTuple):
    """The pure functions of a config; see `steps`."""

    init: Callable[..., steps.TrainState]  # init(key, encoder=None)
    train_step: Callable
    logits_step: Callable
    predict_step: Callable
    eval_step: Callable
    schedule: optax.Schedule
    context: int  # pixels around what a tile predicts that all but train_step need

    def shapes(self) -> steps.TrainState:
        """The training state as jax.ShapeDtypeStructs."""
        return jax.eval_shape(self.init, jax.random.key(0))


def assemble(
    config: ConfigDict,
    num_classes: int,
    num_channels: int,
    class_weights: Sequence[float] | None = None,
) -> Run:
    """Makes a config's model, optimizer, loss and augmentation, and the steps of them.

    class_weights: the numbers that loss_options.class_weights stands for; only training needs them.
    """
    model = models.build(config.model, num_classes)
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
    options = models.given(config.loss_options.to_dict() | {"class_weights": class_weights})
    loss_fn = functools.partial(losses.LOSSES[config.loss], **options)
    if "border" in config and config.border.weight > 0:  # older runs have no such field
        loss_fn = losses.with_border(loss_fn, class_weights)
    normalize = NORMALIZATIONS[normalization(config.model)]
    resolution = config.data.resolution
    augment = make_augment(
        config.data.crop_size,
        context=model.context,
        resolution=resolution,
        **config.augment.to_dict(),
    )
    # Unpadded convolutions get real context around what they predict. At another resolution it may
    # not be a whole number of pixels: there, the tile's outermost predictions come from mirrored
    # context, and are not used.
    inner = model.clone(has_context=True)
    logits_step = cpu.fast(
        steps.make_logits_step(
            inner if resolution == 1.0 else model, normalize, resolution=resolution
        )
    )
    predict_step = steps.make_predict_step(logits_step)

    def confusion(predictions, labels):
        return metrics.confusion_matrix(predictions, labels, num_classes)

    return Run(
        init=functools.partial(
            steps.init_state,
            model,
            tx,
            normalize=normalize,
            num_channels=num_channels,
            with_ema=config.ema_decay > 0,
        ),
        train_step=cpu.fast(
            steps.make_train_step(
                inner,
                tx,
                loss_fn,
                augment,
                normalize,
                ema_decay=config.ema_decay,
                num_microbatches=config.num_microbatches,
            )
        ),
        logits_step=logits_step,
        predict_step=predict_step,
        eval_step=steps.make_eval_step(predict_step, confusion),
        schedule=schedule,
        context=math.ceil(model.context / resolution),
    )


def normalization(model: ConfigDict) -> str:
    """The name of what config.model is normalized by: as it says, or as its weights need it."""
    of_weights = ENCODERS[model.encoder].normalization if model.pretrained else "unit"
    return model.normalization or of_weights


def state_placement(config: ConfigDict, shapes: steps.TrainState, devices: Mesh) -> Any:
    """The sharding of each array of one seed's training state: a TrainState of them.

    devices: a mesh without replicas.
    """
    placement = jax.tree.map(lambda _: mesh.replicated(devices), shapes)
    if config.optimizer.sharded:
        placement = placement.replace(opt_state=mesh.spread(shapes.opt_state, devices))
    return placement


def jit_train_step(run: Run, devices: Mesh, placement: Any) -> Any:
    """Returns the compiled train_step(state, batch, key, resident) -> (state, metrics).

    devices: of all seeds, a replica each; state, key and metrics are as of `mesh.stack`.
    placement: as of `state_placement`. The state is donated.
    batch: of all seeds, one after the other, split over the devices.
    resident: as of `device_cache.load`, each device's own copy; {} where batches hold images.
    """

    def train_step(state, batch, key, resident):
        return run.train_step(state, device_cache.gather(resident, batch), key)

    replicated = mesh.replicated(devices)
    states = mesh.stacked(placement, devices)
    keys = mesh.stacked(replicated, devices)
    return jax.jit(
        mesh.side_by_side(train_step, devices),
        in_shardings=(states, mesh.sharded(devices), keys, replicated),
        out_shardings=(states, replicated),
        donate_argnums=0,
    )


def step_shapes(
    run: Run, batch: Mapping[str, jax.ShapeDtypeStruct], devices: Mesh, placement: Any
) -> tuple[Any, Any, Any]:
    """The state, batch and key that `jit_train_step` takes, as they will be placed.

    batch: of one seed.
    """
    key = jax.eval_shape(jax.random.key, 0)
    return (
        mesh.stacked_shapes(placed(run.shapes(), placement), devices),
        mesh.sharded_shapes(batch, devices),
        mesh.stacked_shapes(placed(key, mesh.replicated(mesh.make_mesh())), devices),
    )


def jit_eval_step(run: Run, devices: Mesh) -> Any:
    """Returns the compiled eval_step(variables, batch) -> (counted, maps).

    The results of all examples go to every device, and so to every host: see `scoring.score`.
    """
    mapped = mesh.map_examples(run.eval_step, devices)
    return jax.jit(mapped, out_shardings=mesh.replicated(devices))


def batch_shapes(
    config: ConfigDict, canvas: Sequence[int], num_channels: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The global training batch, as of `pipeline.train_batches` without the names."""
    b = config.batch_size
    shapes = {
        "image": jax.ShapeDtypeStruct((b, *canvas, num_channels), "uint8"),
        "label": jax.ShapeDtypeStruct((b, *canvas), "uint8"),
        "size": jax.ShapeDtypeStruct((b, 2), "int32"),
        "index": jax.ShapeDtypeStruct((b,), "uint32"),
    }
    if config.border.weight > 0:
        shapes["border"] = jax.ShapeDtypeStruct((b, *canvas), "float32")
    return shapes


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with their shardings, of which one may stand for all of a subtree."""

    def place(sharding, part):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    return jax.tree.map(place, shardings, shapes)
