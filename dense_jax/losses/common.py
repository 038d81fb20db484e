"""Checks the input of losses. Computes quotients and powers with finite gradients."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from dense_jax.labels import IGNORE_LABEL

Number = float | int  # because the type checker in the tests rejects 1 as a float
Weights = Sequence[Number] | ArrayLike | None


class Prepared(NamedTuple):
    """The checked input of a loss.

    logits: The logits of classes or regions, 0 at ignored pixels.
    target: Whether a class is the pixel's class, or a region has the pixel.
    valid: Which pixels count.
    has_regions: Whether the labels are masks of regions.
    """

    labels: Integer[Array, "b h w *r"]
    logits: Float[Array, "b h w c"]
    target: Bool[Array, "b h w c"]
    valid: Bool[Array, "b h w"]
    has_regions: bool

    @property
    def probs(self) -> Float[Array, "b h w c"]:
        return jax.nn.sigmoid(self.logits) if self.has_regions else jax.nn.softmax(self.logits)

    def weights(
        self, class_weights: Weights, *, include_background: bool = True
    ) -> Float[Array, " c"]:
        """Returns the weights of classes or regions. Without background, that of class 0 is 0."""
        c, kind = self.logits.shape[-1], "region" if self.has_regions else "class"
        weights = jnp.ones(c) if class_weights is None else jnp.asarray(class_weights)
        if weights.shape != (c,):
            raise ValueError(
                f"class_weights must be {c} numbers, one per {kind}, not {weights.shape}"
            )
        weights = weights.astype(self.logits.dtype)
        return weights if include_background or self.has_regions else weights.at[0].set(0)

    def log_p(self) -> Float[Array, "b h w d"]:
        """Returns log p of each pixel's class (d = 1), or log p or log(1 - p) of each region."""
        if self.has_regions:
            return jax.nn.log_sigmoid(jnp.where(self.target, self.logits, -self.logits))
        # Select instead of multiplying, because a product needs a float32 one-hot array in memory.
        log_p = jax.nn.log_softmax(self.logits)
        return jnp.sum(log_p, axis=-1, where=self.target, keepdims=True)

    def mean_log_p(self, weights: Float[Array, " c"]) -> Float[Array, "b h w"]:
        """Returns the mean of w log p over classes, or the sum of those means over regions."""
        weights = weights.reshape(1, 1, 1, -1)
        if self.has_regions:
            both = jax.nn.log_sigmoid(self.logits) + jax.nn.log_sigmoid(-self.logits)
            return jnp.sum(weights * both / 2, axis=-1)
        return jnp.mean(weights * jax.nn.log_softmax(self.logits), axis=-1)

    def true_weights(self, weights: Float[Array, " c"]) -> Float[Array, "b h w d"]:
        """Returns the weights of the terms of `log_p`, which are 0 at ignored pixels."""
        if self.has_regions:
            weights = jnp.broadcast_to(weights.reshape(1, 1, 1, -1), self.target.shape)
        else:
            weights = jnp.take(weights, self.labels, mode="clip")[..., None]
        return jnp.where(self.valid[..., None], weights, 0)


def prepare(logits: ArrayLike, labels: ArrayLike) -> Prepared:
    """Checks the logits and the labels. Raises ValueError if a shape or a type is wrong."""
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if logits.ndim != 4 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be floats [b, h, w, c], not {logits.dtype} {logits.shape}")
    has_regions, shape = labels.ndim == 4, logits.shape
    if labels.shape != shape[: labels.ndim] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers {shape[:3]}, the logits' [b, h, w], or masks {shape}, not "
            f"{labels.dtype} {labels.shape}"
        )
    num_classes = 2 if has_regions else shape[-1]
    if num_classes > IGNORE_LABEL:
        raise ValueError(
            f"{num_classes} classes, but label {IGNORE_LABEL} is ignored: at most {IGNORE_LABEL}"
        )
    labels = labels.astype(jnp.int32)
    valid = (labels >= 0) & (labels < num_classes)
    if has_regions:
        valid = valid.all(axis=-1)
        target = (labels == 1) & valid[..., None]
    else:
        target = labels[..., None] == jax.lax.broadcasted_iota(jnp.int32, shape, 3)
    # Select before any arithmetic. Selecting later would leave 0 * NaN = NaN in the gradient.
    logits = jnp.where(valid[..., None], logits, 0)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return Prepared(labels, logits, target, valid, has_regions)


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
