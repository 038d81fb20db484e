"""Checks the input of losses. Computes quotients and powers with finite gradients."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from dense_jax.labels import IGNORE_LABEL

Number = float | int  # because the type checker in the tests rejects 1 as a float
Weights = Sequence[Number] | ArrayLike | None


def prepare(
    logits: ArrayLike, labels: ArrayLike
) -> tuple[Float[Array, "b h w c"], Bool[Array, "b h w c"], Bool[Array, "b h w"]]:
    """Returns checked logits (0 at ignored pixels), one-hot targets and a mask of valid pixels."""
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if logits.ndim != 4 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be floats [b, h, w, c], not {logits.dtype} {logits.shape}")
    if labels.shape != logits.shape[:3] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers {logits.shape[:3]}, the logits' [b, h, w], not "
            f"{labels.dtype} {labels.shape}"
        )
    num_classes = logits.shape[-1]
    if num_classes > IGNORE_LABEL:
        raise ValueError(
            f"{num_classes} classes, but label {IGNORE_LABEL} is ignored: at most {IGNORE_LABEL}"
        )
    labels = labels.astype(jnp.int32)
    valid = (labels >= 0) & (labels < num_classes)
    target = labels[..., None] == jax.lax.broadcasted_iota(jnp.int32, logits.shape, 3)
    # Select before any arithmetic. Selecting later would leave 0 * NaN = NaN in the gradient.
    logits = jnp.where(valid[..., None], logits, 0)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), target, valid


def weights_of(weights: Weights, logits: Float[Array, "b h w c"]) -> Float[Array, "1 1 1 c"]:
    num_classes = logits.shape[-1]
    weights = jnp.ones(num_classes) if weights is None else jnp.asarray(weights)
    if weights.shape != (num_classes,):
        raise ValueError(
            f"class_weights must be {num_classes} numbers, one per class, not {weights.shape}"
        )
    return weights.astype(logits.dtype).reshape(1, 1, 1, num_classes)


def check_choice(name: str, value: object, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def ratio(numerator: Array, denominator: Array) -> Array:
    """Returns numerator / denominator, or 0 with gradient 0 if the denominator is 0."""
    some = denominator > 0
    return jnp.where(some, numerator, 0) / jnp.where(some, denominator, 1)


def power(base: Float[Array, "*d"], exponent: Number) -> Float[Array, "*d"]:
    """Returns base ** exponent for base >= 0. The gradient at 0 is 0, even for exponents < 1."""
    some = base > 0
    return jnp.where(some, jnp.where(some, base, 1) ** exponent, 0)
