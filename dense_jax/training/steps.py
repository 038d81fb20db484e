"""The training state, and pure (uncompiled) functions that create and update it.

A training batch has b examples, each on a canvas of H x W pixels:
    image  uint8 [b, H, W, c]
    label  uint8 [b, H, W]
    size   int32 [b, 2], the height and width of the example on the canvas
    index  uint32 [b], the position of the example in the run
and an array [b, H, W, ...] for each additional field of the source.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct, traverse_util
from jaxtyping import Array, PRNGKeyArray

from dense_jax import outputs, program
from dense_jax.devices import tpu
from dense_jax.regions import Regions
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
        """Returns the variables to evaluate: `ema` if not None, else the current values."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    key: PRNGKeyArray,
    initial: Mapping[str, Array] = {},
    *,
    init: Callable[[PRNGKeyArray], Variables],
    tx: optax.GradientTransformation,
    with_ema: bool,
) -> TrainState:
    """Returns the state before the first step.

    Call under `jit` with `out_shardings` to create the state directly on its final devices.

    initial: The variables that replace randomly initialized ones, by their path, such as
      "params/encoder/conv1/conv/kernel".
    init: (key) -> randomly initialized variables for the model.
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(dict(init(key)), sep="/")
    variables = traverse_util.unflatten_dict(flat | dict(initial), sep="/")
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
    model: nn.Module | tpu.InPairs,
    tx: optax.GradientTransformation,
    loss_fn: Callable[..., Array],
    augment: Callable[..., dict[str, Array]],
    normalize: Callable[[Array], Array],
    ema_decay: float = 0.0,
    auxiliary: Mapping[int, float] = {},
    num_microbatches: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """Performs one optimizer step. Returns the new state and the metrics of the step.

    key: The random key of the run, the same in every step.
    resident: The arrays from `device_cache.load`, if the training set is in device memory. The
      batch then holds `row` [b], the indices of its examples, instead of the examples.
    augment: (keys [b], batch) -> a dict with `image`, `label` and any additional fields.
    loss_fn: (logits, label, **fields) -> loss.
    auxiliary: The weights of the losses of the model's auxiliary heads, by stride. These losses use
      the same labels as the main loss.
    num_microbatches: The number of parts in which a batch is processed, one after the other
      (gradient accumulation), to save memory.
    """
    batch = device_cache.gather(resident, batch)
    gradient = functools.partial(
        _gradient,
        key=key,
        model=model,
        loss_fn=loss_fn,
        augment=augment,
        normalize=normalize,
        auxiliary=auxiliary,
    )
    if num_microbatches > 1:
        gradient = functools.partial(_accumulated, gradient, num_microbatches)
    (losses, batch_stats), grads = gradient(state.params, state.batch_stats, batch, state.step)
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
    return state, losses | {
        "train/grad_norm": optax.tree.norm(grads),
        "train/param_norm": optax.tree.norm(params),  # not finite if the update is not finite
    }


def eval_step(
    variables: Variables,
    example: Mapping[str, Array],
    *,
    logits_step: Callable[..., Array],
    num_classes: int,
    loss_fn: Callable[[Array, Array], Array],
    regions: Regions | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns the results of `program.eval_step` for one example, with its loss among the first.

    loss_fn: (logits, label) -> loss. "loss" is this loss times the sum of "counts", so that the sum
      over examples, divided by that of the counts, is the loss of a split.
    """
    logits = logits_step(variables, example["image"], example.get("levels"))
    counted, maps = program.eval_step(
        variables,
        example,
        predict_step=lambda *_: outputs.decide(logits, regions),
        num_classes=num_classes,
        regions=regions,
    )
    loss = loss_fn(logits[None], example["label"][None])
    return counted | {"loss": loss * counted["counts"].sum()}, maps


def _gradient(
    params: Any,
    batch_stats: Any,
    batch: Batch,
    number: Array,
    *,
    key: PRNGKeyArray,
    model: nn.Module | tpu.InPairs,
    loss_fn: Callable[..., Array],
    augment: Callable[..., dict[str, Array]],
    normalize: Callable[[Array], Array],
    auxiliary: Mapping[int, float],
) -> tuple[tuple[dict[str, Array], Any], Any]:
    """Returns ((losses, new batch_stats), gradient) for one microbatch.

    The losses are {metric name: loss}. The gradient is the gradient of their weighted sum.

    number: The position of the microbatch in the run, which selects the dropout masks.
    """
    # Each key depends on the example, not on its position in the batch. The augmentation therefore
    # does not depend on how many devices, hosts or microbatches share the batch.
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(batch["index"])
    targets = augment(keys, batch)
    image, label = targets.pop("image"), targets.pop("label")
    # No example has the index 2**32 - 1, so no augmentation uses this key. Dropout masks depend on
    # the position in the microbatch, so they do not change with the number of devices or hosts.
    dropout = jax.random.fold_in(key, 2**32 - 1)

    def loss_of(params):
        logits, mutated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            normalize(image),
            train=True,
            mutable=["batch_stats", "intermediates"],
            rngs={"dropout": jax.random.fold_in(dropout, number)},
        )
        total = loss_fn(logits, label, **targets)
        losses = {"train/loss": total}
        for stride, weight in auxiliary.items():
            (sown,) = mutated["intermediates"]["auxiliary_logits"]
            loss = losses[f"train/auxiliary_loss/{stride}"] = loss_fn(
                sown[stride], label, **targets
            )
            total += weight * loss
        return total, (losses, mutated.get("batch_stats", {}))

    (_, values), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return values, grads


def _accumulated(
    gradient: Callable,
    num_microbatches: int,
    params: Any,
    batch_stats: Any,
    batch: Batch,
    step: Array,
) -> tuple[tuple[dict[str, Array], Any], Any]:
    """Returns ((losses, new batch_stats), gradient) for a batch, computed one microbatch at a time.

    The losses and the gradient are averaged over the microbatches. For a loss that is a mean over
    pixels, the average is exact only if every microbatch has the same total weight of valid pixels.
    Overlap losses (Dice, Jaccard, Lovász) are means over the microbatches. Batch norm normalizes
    each microbatch separately, and updates its running averages after each.
    """

    def add(carry, numbered):
        batch_stats, total = carry
        (losses, batch_stats), grads = gradient(params, batch_stats, *numbered)
        return (batch_stats, jax.tree.map(jnp.add, total, grads)), losses

    # Microbatch m holds the examples m, m + num_microbatches, ... of the batch. Every device has an
    # equal part of each microbatch, so no example moves between devices.
    size = len(batch["index"]) // num_microbatches
    microbatches = optax.microbatching.reshape_batch_axis(batch, size)
    numbers = step * num_microbatches + jnp.arange(num_microbatches)
    start = batch_stats, jax.tree.map(jnp.zeros_like, params)
    (batch_stats, total), losses = jax.lax.scan(add, start, (microbatches, numbers))
    grads = jax.tree.map(lambda x: x / num_microbatches, total)
    return (jax.tree.map(jnp.mean, losses), batch_stats), grads
