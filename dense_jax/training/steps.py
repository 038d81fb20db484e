"""The train and evaluation steps: pure functions, compiled by `jit` at the call site.

Nothing of ours is imported: model, optimizer, loss, augmentation and metric come in as arguments,
and `normalize`, from an image's bytes to what the network sees. A network may return the logits of
the middle of its images alone; then the training labels are those of the middle.
A training batch holds `image` uint8 [b, H, W, c], `label` uint8 [b, H, W], `size` int32 [b, 2], the
valid part of the canvas, `index` uint32 [b], the example's number in the run, and what else the loss
takes of each pixel. Evaluation and prediction are written for one example; `mesh.map_examples`
makes them take batches.
"""

import fractions
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

Batch = Mapping[str, Array]
Variables = Mapping[str, Any]


@struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold. Arrays only.

    step: int32, optimizer steps done.
    ema: moving averages of params and batch_stats, or None.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any

    def variables(self) -> Variables:
        """What the model is evaluated with."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    key: PRNGKeyArray,
    *,
    normalize: Callable[[Array], Array],
    num_channels: int,
    with_ema: bool,
    encoder: Variables | None = None,
) -> TrainState:
    """The state before the first step; jit it so that it is born where it is to live.

    encoder: variables of model.encoder in place of random ones.
    """
    image = normalize(jnp.zeros((1, 64, 64, num_channels), jnp.uint8))
    variables = model.init(key, image, train=False)
    for collection, values in (encoder or {}).items():
        variables[collection]["encoder"] = values
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        ema={"params": params, "batch_stats": batch_stats} if with_ema else None,
    )


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_fn: Callable[..., Array],
    augment: Callable,
    normalize: Callable[[Array], Array],
    *,
    ema_decay: float = 0.0,
    num_microbatches: int = 1,
) -> Callable[[TrainState, Batch, PRNGKeyArray], tuple[TrainState, dict[str, Array]]]:
    """Returns train_step(state, batch, key) -> (state, metrics), with the run's key.

    augment: (key, example) -> {"image", "label", ...}, for one example.
    loss_fn: (logits, label, **...) -> loss, with what augment returns beside the image.
    num_microbatches: parts of the batch that are taken one after the other, for one optimizer step
      (gradient accumulation); only one part's activations are in memory.

    Loss and gradient are the mean of the microbatches' own, each with its own normalization. They
    are the whole batch's only where the loss is a mean over pixels, or over images, and every
    microbatch has the same weight of valid ones: overlaps (Dice, Jaccard, Lovász) per batch are per
    microbatch. Batch norm sees one microbatch, and its running averages take each in turn. On
    several hosts, other examples share a microbatch than on one.
    """

    def gradient(params, batch_stats, key, batch, number):
        """Returns ((loss, new batch_stats), gradient) of a microbatch, `number` in the run."""
        # Keyed by the example, not by its place in the batch: the pixels do not depend on how
        # many devices, hosts or microbatches share the batch.
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(batch["index"])
        targets = jax.vmap(augment)(keys, batch)
        image, label = targets.pop("image"), targets.pop("label")
        # Examples are numbered from 0; the last number there is belongs to none. Masks belong to
        # places in the microbatch, the same on any number of devices.
        dropout = jax.random.fold_in(key, 2**32 - 1)

        def loss_of(params):
            logits, mutated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                normalize(image),
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(dropout, number)},
            )
            return loss_fn(logits, label, **targets), mutated.get("batch_stats", {})

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    def accumulated(params, batch_stats, key, batch, step):
        """Returns the same of a batch, by its microbatches one after the other."""

        def add(carry, numbered):
            batch_stats, total = carry
            (loss, batch_stats), grads = gradient(params, batch_stats, key, *numbered)
            return (batch_stats, jax.tree.map(jnp.add, total, grads)), loss

        # Number m takes the places m, m + num_microbatches, ... of the batch: each device has as
        # many of them as any other, so that no example moves.
        microbatches = {
            field: array.reshape(-1, num_microbatches, *array.shape[1:]).swapaxes(0, 1)
            for field, array in batch.items()
        }
        numbers = step * num_microbatches + jnp.arange(num_microbatches)
        start = batch_stats, jax.tree.map(jnp.zeros_like, params)
        (batch_stats, total), losses = jax.lax.scan(add, start, (microbatches, numbers))
        grads = jax.tree.map(lambda x: x / num_microbatches, total)
        return (jnp.mean(losses), batch_stats), grads

    def train_step(state: TrainState, batch: Batch, key: PRNGKeyArray):
        of_batch = gradient if num_microbatches == 1 else accumulated
        (loss, batch_stats), grads = of_batch(
            state.params, state.batch_stats, key, batch, state.step
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            # The average of the first steps, not of the random initial values.
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            new = {"params": params, "batch_stats": batch_stats}
            # In this form, what does not change keeps its very bits.
            ema = jax.tree.map(lambda old, x: old + (1 - decay) * (x - old), ema, new)
        state = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
        return state, {
            "train/loss": loss,
            "train/grad_norm": optax.tree.norm(grads),
            "train/param_norm": optax.tree.norm(params),  # not finite: the update was not
        }

    return train_step


def make_logits_step(
    model: nn.Module, normalize: Callable[[Array], Array], *, resolution: float = 1.0
) -> Callable[[Variables, UInt8[Array, "h w c"]], Float[Array, "h w num_classes"]]:
    """Returns logits_step(variables, image) -> logits, for one image, at its own resolution.

    resolution: the network sees the image resized by this factor, to whole pixels (halves up); its
      logits are resized back.
    Where the network returns the middle alone, the logits around it are 0 and mean nothing.
    """
    p, q = fractions.Fraction(resolution).limit_denominator(1000).as_integer_ratio()

    def logits_step(
        variables: Variables, image: UInt8[Array, "h w c"]
    ) -> Float[Array, "h w num_classes"]:
        h, w, _ = image.shape
        if resolution != 1.0:  # before it is normalized, as in training
            size = [jax.core.max_dim(1, (2 * n * p + q) // (2 * q)) for n in (h, w)]
            image = _resized(image.astype(jnp.float32), size)
        logits = jnp.asarray(model.apply(variables, normalize(image)[None], train=False))[0]
        if resolution != 1.0:
            logits = _resized(logits, (h, w))
        around = [((n - m) // 2,) * 2 for n, m in zip((h, w), logits.shape[:2], strict=True)]
        return jnp.pad(logits, [*around, (0, 0)])

    return logits_step


def _resized(image: Float[Array, "h w c"], size: Sequence[Any]) -> Float[Array, "H W c"]:
    """Bilinear interpolation with half-pixel centers and clamped edges.

    As jax.image.resize(antialias=False), but by whole numbers up to the weights: so they are the
    same to the last bit where sizes are symbols (jax.export).
    """
    products = ("hwc,Hh->Hwc", "hwc,Ww->hWc")
    for product, old, new in zip(products, image.shape[:2], size, strict=True):
        # Centers of the pixels, in 1 / (2 * new) of an old one from the first old one's.
        old_centers = 2 * new * jnp.arange(old)[None]
        new_centers = ((2 * jnp.arange(new) + 1) * old - new)[:, None]
        distances = jnp.abs(jnp.clip(new_centers, 0, 2 * new * (old - 1)) - old_centers)
        weights = jnp.maximum(0, 2 * new - distances).astype(jnp.float32) / jnp.float32(2 * new)
        image = jnp.einsum(product, image, weights, precision="highest")
    return image


def make_predict_step(
    logits_step: Callable,
) -> Callable[[Variables, UInt8[Array, "h w c"]], UInt8[Array, "h w"]]:
    """Returns predict_step(variables, image) -> the class of each pixel, for one image."""

    def predict_step(variables: Variables, image: UInt8[Array, "h w c"]) -> UInt8[Array, "h w"]:
        return jnp.argmax(logits_step(variables, image), axis=-1).astype(jnp.uint8)

    return predict_step


def make_eval_step(
    predict_step: Callable, confusion_matrix: Callable
) -> Callable[[Variables, Batch], tuple[Batch, UInt8[Array, "h w 2"]]]:
    """Returns eval_step(variables, example) -> (counted, maps), for one example.

    counted: {"index": the example's, "counts": its confusion matrix}, both for the host.
    maps: predicted classes and label, side by side so that they stay together.
    """

    def eval_step(variables: Variables, example: Batch):
        classes = predict_step(variables, example["image"])
        counts = confusion_matrix(classes, example["label"])
        maps = jnp.stack([classes, example["label"].astype(jnp.uint8)], axis=-1)
        return {"index": example["index"], "counts": counts}, maps

    return eval_step
