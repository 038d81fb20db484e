"""Converts the logits of classes, which exclude each other, or of regions, which may overlap.

In the functions, `regions` is None for classes. The logits of c classes or of r regions are the
last axis of an array, and become probabilities by a softmax or by a sigmoid.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, UInt8

from dense_jax.regions import Regions


def targets(label: Integer[Array, "*d"], regions: Regions | None) -> Integer[Array, "..."]:
    """Returns what a loss compares with the logits: class ids [*d], or masks [*d, r]."""
    return label if regions is None else jnp.take(jnp.asarray(regions.table), label, axis=0)


def probabilities(logits: Float[Array, "*d"], regions: Regions | None) -> Float[Array, "*d"]:
    return jax.nn.softmax(logits) if regions is None else jax.nn.sigmoid(logits)


def decide(logits: Float[Array, "*d c"], regions: Regions | None) -> UInt8[Array, "..."]:
    """Returns the most probable class of each pixel, [*d], or the masks of the regions, [*d, r]."""
    if regions is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.uint8)
    return inside(jax.nn.sigmoid(logits), regions)


def inside(probabilities: Float[Array, "*d r"], regions: Regions) -> UInt8[Array, "*d r"]:
    """Returns 1 where the probability of a region is larger than its threshold, and 0 elsewhere."""
    thresholds = jnp.asarray(regions.thresholds, probabilities.dtype)
    is_inside = probabilities > jnp.broadcast_to(thresholds, probabilities.shape)
    return is_inside.astype(jnp.uint8)
