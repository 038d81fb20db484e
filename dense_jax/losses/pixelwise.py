"""Losses that are means over pixels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dense_jax.losses.common import Number, Weights, power, prepare, ratio


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_weights: Weights = None,
    pixel_weights: ArrayLike | None = None,
    label_smoothing: Number = 0.0,
    top_k_fraction: Number = 1.0,
) -> Float[Array, ""]:
    """Returns the weighted mean of the negative log-likelihood, in nats per pixel.

    The loss is (sum_i v_i l_i) / (sum_i v_i w[y_i]), summed over the valid pixels i. y are the
    labels, v [b, h, w] the pixel weights, and w the class weights. The loss of pixel i is
    l_i = -sum_j w[j] ((1 - e) t[i, j] + e / c) log p[i, j], summed over the c classes j. t are the
    one-hot labels, p the softmax probabilities, and e the label smoothing. As in PyTorch, class
    weights also apply to the smoothed labels.

    If `top_k_fraction` < 1, both sums over i include only the k pixels with the largest v_i l_i.
    Pixels with the same v_i l_i as the k-th pixel are also included. k is `top_k_fraction` times
    the number of valid pixels, rounded up (Wu et al. 2016, "Bridging category-level and
    instance-level semantic image segmentation", section 3.2).
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], not {label_smoothing}")
    if not 0 < top_k_fraction <= 1:
        raise ValueError(f"top_k_fraction must be in (0, 1], not {top_k_fraction}")
    x = prepare(logits, labels)
    if pixel_weights is None:
        pixel_weights = jnp.ones(x.valid.shape, x.logits.dtype)
    elif jnp.shape(pixel_weights) != x.valid.shape:
        raise ValueError(
            f"pixel_weights must have the labels' shape {x.valid.shape}, not "
            f"{jnp.shape(pixel_weights)}"
        )
    pixel_weights = jnp.where(x.valid, jnp.asarray(pixel_weights, x.logits.dtype), 0)  # [b, h, w]

    class_weights = x.weights(class_weights)
    weights = x.true_weights(class_weights)
    nll = -(1 - label_smoothing) * jnp.sum(weights * x.log_p(), axis=-1)
    if label_smoothing:
        nll -= label_smoothing * x.mean_log_p(class_weights)
    loss = pixel_weights * nll  # [b, h, w], in nats
    weights = pixel_weights * jnp.sum(weights, axis=-1)  # [b, h, w]
    if top_k_fraction < 1:
        hardest_first = jnp.sort(
            jax.lax.stop_gradient(jnp.where(x.valid, loss, -jnp.inf)), axis=None, descending=True
        )
        k = jnp.ceil(top_k_fraction * jnp.sum(x.valid)).astype(jnp.int32)
        keep = loss >= hardest_first[jnp.maximum(k - 1, 0)]
        loss, weights = jnp.where(keep, loss, 0), jnp.where(keep, weights, 0)
    return ratio(jnp.sum(loss), jnp.sum(weights))


def focal(
    logits: ArrayLike, labels: ArrayLike, *, gamma: Number = 2.0, class_weights: Weights = None
) -> Float[Array, ""]:
    """Returns the focal loss, which down-weights well-classified pixels, in nats per pixel.

    The loss is (sum w[y] (1 - p[y])^gamma (-log p[y])) / (sum w[y]) over the valid pixels. y is a
    pixel's label, p its softmax (not sigmoid) probabilities, and w the class weights, which Lin et
    al. 2017 call alpha ("Focal loss for dense object detection", section 3.2). gamma = 0 gives
    `cross_entropy`.
    """
    x = prepare(logits, labels)
    weights, log_p = x.true_weights(x.weights(class_weights)), x.log_p()
    loss = power(-jnp.expm1(log_p), gamma) * -log_p
    return ratio(jnp.sum(weights * loss), jnp.sum(weights))


def boundary(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    distances: ArrayLike,
    class_weights: Weights = None,
    include_background: bool = True,
) -> Float[Array, ""]:
    """Returns the boundary loss: the mean of p d over pixels, averaged over classes, in pixels.

    p is the softmax probability of a class, and d [b, h, w, c] the signed distance to the class's
    boundary, which is negative inside the class (Kervadec et al. 2019, "Boundary loss for highly
    unbalanced segmentation", arXiv 1812.07032, section 2). The loss may be negative. The paper adds
    it, with a small weight, to a loss of the overlap.

    distances: The field of `data.targets.signed_distances`. A class whose distances are 0 at all
      valid pixels is absent from the images, and is excluded from the mean over classes.
    class_weights: The weights of the classes in the mean.
    include_background: Whether the mean includes class 0.
    """
    x = prepare(logits, labels)
    if jnp.shape(distances) != x.logits.shape:
        raise ValueError(
            f"distances must have the logits' shape {x.logits.shape}, not {jnp.shape(distances)}"
        )
    distances = jnp.where(x.valid[..., None], jnp.asarray(distances, x.logits.dtype), 0)
    pixels = (0, 1, 2)
    loss = ratio(jnp.sum(x.probs * distances, axis=pixels), jnp.sum(x.valid))  # [c]
    weights = x.weights(class_weights, include_background=include_background)
    weights = jnp.where(jnp.any(distances != 0, axis=pixels), weights, 0)
    return ratio(jnp.sum(weights * loss), jnp.sum(weights))


def with_border_weights(
    loss: Callable[..., Float[Array, ""]], class_weights: Weights
) -> Callable[..., Float[Array, ""]]:
    """Returns a function of (logits, labels, border) that computes `loss` with border weights.

    border [b, h, w] is the field BORDER of `data.targets`. The weight of a pixel is w[y] + border,
    where y is its label and w the class weights (Ronneberger et al. 2015, "U-Net", section 3,
    equation 2). If w[y] is 0, the pixel has weight 0.
    """

    def weighted_loss(logits: Array, labels: Array, border: Array) -> Float[Array, ""]:
        x = prepare(logits, labels)
        weights = jnp.mean(x.true_weights(x.weights(class_weights)), axis=-1)
        # `loss` multiplies pixel weights by w[y].
        return loss(logits, labels, pixel_weights=1 + ratio(border, weights))

    return weighted_loss
