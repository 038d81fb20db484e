"""Sums from which `metrics.calibration` scores probabilities, computed on the device."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from dense_jax.metrics.calibration import NUM_BINS, THRESHOLDS
from dense_jax.metrics.confusion import confusion_matrix

# A histogram is counted in finer bins, whose midpoints stand for the probabilities in them. The
# sum of the probabilities is therefore off by at most 1 / (2 * 15 * 500) = 0.00007 per pixel.
NUM_LEVELS = 500  # per bin
# The cells (bin, level, is hit) are counted as the cells of a square confusion matrix.
SIDE = 125
assert NUM_BINS * NUM_LEVELS * 2 <= SIDE**2


def sums(
    logits: Float[Array, "h w c"], label: Integer[Array, "h w *c"]
) -> dict[str, Float[Array, "..."] | Integer[Array, "..."]]:
    """Returns sums over the valid pixels of an example, for the probabilities softmax(logits).

    They are "nll" and "brier", as in `calibration.ProbabilitySums`, and the entries of the
    reliability histograms: "binned", int32 [c + 1, NUM_BINS, 2], which has the exact numbers of
    pixels and hits, and "probability", float32 [c + 1, NUM_BINS].

    If `label` has the masks of regions, the probabilities are sigmoid(logits), and a pixel counts
    once for each region, with the classes outside and inside. Histogram k is that of the inside of
    region k.
    """
    if label.ndim == 3:
        both = jnp.stack([jnp.zeros_like(logits), logits], axis=-1)
        by_region = jax.lax.map(
            lambda region: sums(*region), (jnp.moveaxis(both, 2, 0), jnp.moveaxis(label, 2, 0))
        )
        return {
            name: jnp.concatenate([x[:, 1], x[:, 2].sum(axis=0, keepdims=True)])
            if x.ndim > 1
            else x.sum()
            for name, x in by_region.items()
        }
    is_true = label[..., None] == jnp.arange(logits.shape[-1])[None, None]
    is_valid = (label >= 0) & (label < logits.shape[-1])
    logs = jax.nn.log_softmax(logits)
    p = jnp.exp(logs)
    is_hit = jnp.argmax(logits, axis=-1) == label

    def lanes(of_classes: Array, of_top: Array) -> Array:
        return jnp.concatenate([jnp.moveaxis(of_classes, -1, 0), of_top[None]])

    binned, probability = jax.lax.map(
        lambda lane: _histogram(lane[0], lane[1], is_valid),
        (lanes(p, p.max(axis=-1)), lanes(is_true, is_hit)),
    )
    return {
        "nll": -jnp.where(is_true, logs, 0).sum(),
        "brier": jnp.where(is_valid[..., None], jnp.square(p - is_true), 0).sum(),
        "binned": binned,
        "probability": probability,
    }


def nll(
    logits: Float[Array, "networks h w c"],
    label: Integer[Array, "h w"],
    temperatures: Float[Array, " t"],
) -> Float[Array, " t"]:
    """Returns the sum of -log p[y] over the valid pixels at each temperature.

    p is the mean over the networks of softmax(logits / temperature).
    """
    is_true = label[..., None] == jnp.arange(logits.shape[-1])[None, None]
    is_valid = (label >= 0) & (label < logits.shape[-1])
    logits -= logits.max(axis=-1, keepdims=True)
    true_logit = jnp.where(is_true[None], logits, 0).sum(axis=-1)

    def at(temperature: Array) -> Array:
        total = jnp.exp(logits / temperature).sum(axis=-1)
        logs = jax.nn.logsumexp(true_logit / temperature - jnp.log(total), axis=0)
        return jnp.where(is_valid, math.log(len(logits)) - logs, 0).sum()

    return jax.lax.map(at, temperatures)


def by_threshold(
    p: Float[Array, "h w r"], masks: Integer[Array, "h w r"]
) -> Integer[Array, "r 2 levels"]:
    """Returns the number of pixels outside and inside each region at each level of probability.

    The level of a probability is the number of THRESHOLDS that are smaller.
    """
    level = jnp.searchsorted(jnp.asarray(THRESHOLDS, p.dtype), p)

    def count(pair: tuple[Array, Array]) -> Array:
        return confusion_matrix(*pair, len(THRESHOLDS) + 1)[:2]

    return jax.lax.map(count, (jnp.moveaxis(level, -1, 0), jnp.moveaxis(masks, -1, 0)))


def _histogram(
    p: Float[Array, "h w"], is_hit: Bool[Array, "h w"], is_valid: Bool[Array, "h w"]
) -> tuple[Integer[Array, "bins 2"], Float[Array, " bins"]]:
    """Returns the numbers of pixels and hits in each bin, and the sum of the probabilities."""
    num_levels = NUM_BINS * NUM_LEVELS
    level = jnp.clip(jnp.ceil(p * num_levels).astype(jnp.int32) - 1, 0, num_levels - 1)
    cell = 2 * level + is_hit
    row = jnp.where(is_valid, cell // SIDE, -1)
    cells = confusion_matrix(cell % SIDE, row, SIDE).reshape(-1)[: 2 * num_levels]
    cells = cells.reshape(NUM_BINS, NUM_LEVELS, 2)
    midpoints = (jnp.arange(num_levels) + 0.5).reshape(NUM_BINS, NUM_LEVELS) / num_levels
    pixels = cells.sum(axis=2)
    binned = jnp.stack([pixels.sum(axis=1), cells[..., 1].sum(axis=1)], axis=-1)
    return binned, (pixels * midpoints).sum(axis=1)
