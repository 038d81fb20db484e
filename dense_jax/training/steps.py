"""The training state, and pure (uncompiled) functions that create and update it.

A training batch holds `image` [b, H, W, c], `label` uint8 [b, H, W], `size` int32 [b, 2] (the valid
part of the canvas), `index` uint32 [b] (the example's position in the run), and the source's
additional per-pixel fields [b, H, W]. Model, optimizer, loss and augmentation are arguments. If a
model returns logits for only the central part of its images, the training labels cover this part.
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
    """The complete training state, as saved in checkpoints. All leaves are arrays.

    step: The number of optimizer steps done, int32.
    ema: The moving averages of params and batch_stats, or None.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any

    def variables(self) -> Variables:
        """Returns the variables to evaluate: the moving averages if any, else the latest values."""
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

    Call this function under `jit` with `out_shardings`, which creates the state on its final
    devices.

    encoder: The initial variables of the encoder. If None, the encoder is initialized randomly.
    init: (key) -> randomly initialized variables for the model.
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
    """Performs one optimizer step and returns the new state and the step's metrics.

    key: The random key of the run, the same in every step.
    resident: A training set in device memory, returned by `device_cache.load`. If given, the batch
      holds `row` [b] instead of the examples.
    augment: (key, example) -> {"image", "label", ...}, for one example.
    loss_fn: (logits, label, **fields) -> loss. `augment` returns the fields with image and label.
    num_microbatches: The number of microbatches per batch. They are processed in sequence (gradient
      accumulation), so only one microbatch's activations are in memory.
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
        # A lower decay in the first steps makes the average forget the random initial values.
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        new = {"params": params, "batch_stats": batch_stats}
        # In this form, the average of a constant stays bitwise constant.
        ema = jax.tree.map(lambda old, x: old + (1 - decay) * (x - old), ema, new)
    state = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
    return state, {
        "train/loss": loss,
        "train/grad_norm": optax.tree.norm(grads),
        "train/param_norm": optax.tree.norm(params),  # not finite if the update is not finite
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
    """Returns ((loss, new batch_stats), gradient) for the `number`-th microbatch of the run."""
    # Each key depends on the example, not on its position in the batch. The augmentation therefore
    # does not depend on how many devices, hosts or microbatches share the batch.
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(batch["index"])
    targets = jax.vmap(augment)(keys, batch)
    image, label = targets.pop("image"), targets.pop("label")
    # No example has the index 2**32 - 1, so no augmentation uses this key. Dropout masks depend on
    # the position in the microbatch, so they do not change with the number of devices.
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
    """Returns the result of `gradient` for a whole batch, averaged over its microbatches.

    The averages equal the loss and gradient of the whole batch only if two conditions hold: the
    loss is a mean over pixels or images, and the valid pixels or images of every microbatch have
    the same total weight. Overlap losses (Dice, Jaccard, Lovász) of a batch are computed over
    each microbatch instead. Batch norm processes each microbatch separately and updates its running
    averages after each.
    """

    def add(carry, numbered):
        batch_stats, total = carry
        (loss, batch_stats), grads = gradient(params, batch_stats, *numbered)
        return (batch_stats, jax.tree.map(jnp.add, total, grads)), loss

    # Microbatch m holds the examples m, m + num_microbatches, ... of the batch. Every device has an
    # equal part of each microbatch, so no example moves between devices. With several hosts, the
    # microbatches hold different examples than with one host.
    size = len(batch["index"]) // num_microbatches
    microbatches = optax.microbatching.reshape_batch_axis(batch, size)
    numbers = step * num_microbatches + jnp.arange(num_microbatches)
    start = batch_stats, jax.tree.map(jnp.zeros_like, params)
    (batch_stats, total), losses = jax.lax.scan(add, start, (microbatches, numbers))
    grads = jax.tree.map(lambda x: x / num_microbatches, total)
    return (jnp.mean(losses), batch_stats), grads
