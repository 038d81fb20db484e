"""The training state, and the step that changes it: pure functions, compiled by `jit` at the call site.

A training batch holds `image` [b, H, W, c], `label` uint8 [b, H, W], `size` int32 [b, 2] (the valid
part of the canvas), `index` uint32 [b] (the example's number in the run), and the source's other
per-pixel fields [b, H, W]. Model, optimizer, loss and augmentation are arguments. A model may return
the logits of the middle of its images alone; then the training labels are those of the middle.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jaxtyping import Array, PRNGKeyArray

from dense_jax.training import device_cache

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
        """Returns the variables that the model is evaluated with."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    key: PRNGKeyArray,
    encoder: Variables | None = None,
    *,
    init: Callable[[PRNGKeyArray], Variables],
    tx: optax.GradientTransformation,
    with_ema: bool,
) -> TrainState:
    """Returns the state before the first step.

    Call it under `jit` with `out_shardings`, so that the state is created on its final devices.

    encoder: variables of the encoder, instead of random ones.
    init: returns the model's random variables.
    """
    variables = dict(init(key))
    for collection, values in (encoder or {}).items():
        variables[collection] = variables[collection] | {"encoder": values}
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        ema={"params": params, "batch_stats": batch_stats} if with_ema else None,
    )


def train_step(
    state: TrainState,
    batch: Batch,
    key: PRNGKeyArray,
    resident: Mapping[str, Array] = {},
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_fn: Callable[..., Array],
    augment: Callable[..., dict[str, Array]],
    normalize: Callable[[Array], Array],
    ema_decay: float = 0.0,
    num_microbatches: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """Does one optimizer step; returns the new state and the step's metrics.

    key: the run's; the same in every step.
    resident: a training set in device memory, returned by `device_cache.load`; then the batch holds
      `row` [b] in place of the examples.
    augment: (key, example) -> {"image", "label", ...}, for one example.
    loss_fn: (logits, label, **fields) -> loss, with what augment returns beside image and label.
    num_microbatches: parts of the batch that are taken one after the other (gradient accumulation);
      only one part's activations are in memory.
    """
    batch = device_cache.gather(resident, batch)
    gradient = functools.partial(
        _gradient, key=key, model=model, loss_fn=loss_fn, augment=augment, normalize=normalize
    )
    if num_microbatches > 1:
        gradient = functools.partial(_accumulated, gradient, num_microbatches)
    (loss, batch_stats), grads = gradient(state.params, state.batch_stats, batch, state.step)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        # The average starts from the first steps, not from the random initial values.
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        new = {"params": params, "batch_stats": batch_stats}
        # Written this way, values that do not change stay bitwise the same.
        ema = jax.tree.map(lambda old, x: old + (1 - decay) * (x - old), ema, new)
    state = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
    return state, {
        "train/loss": loss,
        "train/grad_norm": optax.tree.norm(grads),
        "train/param_norm": optax.tree.norm(params),  # not finite: the update was not
    }


def _gradient(
    params: Any,
    batch_stats: Any,
    batch: Batch,
    number: Array,
    *,
    key: PRNGKeyArray,
    model: nn.Module,
    loss_fn: Callable[..., Array],
    augment: Callable[..., dict[str, Array]],
    normalize: Callable[[Array], Array],
) -> tuple[tuple[Array, Any], Any]:
    """Returns ((loss, new batch_stats), gradient) of a microbatch, number `number` of the run."""
    # The key belongs to the example, not to its place in the batch: the pixels do not depend on how
    # many devices, hosts or microbatches share the batch.
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(batch["index"])
    targets = jax.vmap(augment)(keys, batch)
    image, label = targets.pop("image"), targets.pop("label")
    # No example has the index 2**32 - 1, so this key is not shared with any augmentation. Dropout
    # masks depend on the place in the microbatch, so they do not change with the number of devices.
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


def _accumulated(
    gradient: Callable,
    num_microbatches: int,
    params: Any,
    batch_stats: Any,
    batch: Batch,
    step: Array,
) -> tuple[tuple[Array, Any], Any]:
    """Returns what `gradient` returns, of a batch that is taken in microbatches.

    Loss and gradient are the mean of the microbatches' own, each with its own normalization. They
    are the whole batch's only where the loss is a mean over pixels, or over images, and every
    microbatch has the same weight of valid ones. Overlaps (Dice, Jaccard, Lovász) per batch are per
    microbatch. Batch norm sees one microbatch, and its running averages take each in turn.
    """

    def add(carry, numbered):
        batch_stats, total = carry
        (loss, batch_stats), grads = gradient(params, batch_stats, *numbered)
        return (batch_stats, jax.tree.map(jnp.add, total, grads)), loss

    # Number m takes the places m, m + num_microbatches, ... of the batch. Each device has as many of
    # them as any other, so no example moves. On several hosts, a microbatch holds other examples
    # than on one.
    size = len(batch["index"]) // num_microbatches
    microbatches = optax.microbatching.reshape_batch_axis(batch, size)
    numbers = step * num_microbatches + jnp.arange(num_microbatches)
    start = batch_stats, jax.tree.map(jnp.zeros_like, params)
    (batch_stats, total), losses = jax.lax.scan(add, start, (microbatches, numbers))
    grads = jax.tree.map(lambda x: x / num_microbatches, total)
    return (jnp.mean(losses), batch_stats), grads
