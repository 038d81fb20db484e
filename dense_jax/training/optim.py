"""Optimizers and learning-rate schedules, all built with Optax."""

from collections.abc import Callable

import jax
import optax

SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, max(steps, 1)),
    # (1 - t / T)^0.9, usual in segmentation since DeepLab (arXiv 1606.00915, section 4.1).
    "poly": lambda peak, steps: optax.polynomial_schedule(peak, 0.0, 0.9, max(steps, 1)),
}
# Each entry is called as (schedule, momentum, weight decay, mask of the decayed parameters).
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": lambda schedule, momentum, decay, mask: optax.adamw(
        schedule, b1=momentum, weight_decay=decay, mask=mask
    ),
    "sgd": lambda schedule, momentum, decay, mask: optax.chain(
        optax.add_decayed_weights(decay, mask=mask),
        optax.sgd(schedule, momentum=momentum or None),
    ),
}


def make_schedule(
    name: str, learning_rate: float, *, warmup_steps: int, num_steps: int
) -> optax.Schedule:
    """Returns a linear warmup from 0 over warmup_steps, followed by SCHEDULES[name]."""
    decay = SCHEDULES[name](learning_rate, num_steps - warmup_steps)
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    momentum: float,
    weight_decay: float,
    grad_clip_norm: float,
    encoder_lr_multiplier: float = 1.0,
    freeze_encoder: bool = False,
) -> optax.GradientTransformation:
    """Returns an optimizer that clips gradients by global norm, then applies OPTIMIZERS[name].

    weight_decay: The decay of all parameters except norm scales and biases. It is decoupled from
      the gradient in AdamW, and added to the gradient in SGD (L2 regularization). Both optimizers
      multiply the decay by the learning rate.
    grad_clip_norm: The maximum global norm of the gradient. If 0, nothing is clipped.
    encoder_lr_multiplier: The factor that multiplies the learning rate of params["encoder"].
    freeze_encoder: Whether to keep params["encoder"] constant, without optimizer state.
    """

    def decayed(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)  # not norm scales and biases

    def part(params):
        label = lambda path, _: "encoder" if path[0].key == "encoder" else "rest"
        return jax.tree_util.tree_map_with_path(label, params)

    clip = optax.clip_by_global_norm(grad_clip_norm) if grad_clip_norm else optax.identity()
    tx = optax.chain(clip, OPTIMIZERS[name](schedule, momentum, weight_decay, decayed))
    if encoder_lr_multiplier != 1.0:
        scale = optax.scale(encoder_lr_multiplier)
        tx = optax.chain(tx, optax.partition({"encoder": scale, "rest": optax.identity()}, part))
    if freeze_encoder:
        tx = optax.partition({"encoder": optax.set_to_zero(), "rest": tx}, part)
    return tx
