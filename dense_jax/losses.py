"""Losses for semantic segmentation, called as `LOSSES[name](logits, labels, **options)`.

All losses are pure functions. logits are floats [b, h, w, c] before the softmax. labels are
integers [b, h, w] in [0, c), c <= 255. The result is a scalar for the whole batch, which is the
global batch under `jit`. Sums are float32, or float64 if the logits are float64.

A pixel is ignored if its label is IGNORE_LABEL or any other number outside [0, c). An ignored pixel
affects neither the loss nor the gradient, even if its logits are NaN. If no pixel is valid, the
loss and the gradient are 0. `class_weights` are c nonnegative numbers. Invalid shapes, types and
options raise ValueError during tracing.

In formulas, p is the softmax probability, t the one-hot label, and sums run over valid pixels.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from dense_jax.labels import IGNORE_LABEL

Number = float | int  # because the type checker in the tests rejects 1 as a float
Weights = Sequence[Number] | ArrayLike | None


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
    logits, target, valid = _prepare(logits, labels)
    class_weights = _class_weights(class_weights, logits)
    if pixel_weights is None:
        pixel_weights = jnp.ones(valid.shape, logits.dtype)
    elif jnp.shape(pixel_weights) != valid.shape:
        raise ValueError(
            f"pixel_weights must have the labels' shape {valid.shape}, not "
            f"{jnp.shape(pixel_weights)}"
        )
    pixel_weights = jnp.where(valid, jnp.asarray(pixel_weights, logits.dtype), 0)  # [b, h, w]

    weighted = class_weights * jax.nn.log_softmax(logits)
    # Select instead of multiplying, because a product needs a float32 one-hot array in memory.
    nll = -(1 - label_smoothing) * jnp.sum(weighted, axis=-1, where=target)
    if label_smoothing:
        nll -= label_smoothing * jnp.mean(weighted, axis=-1)
    loss = pixel_weights * nll  # [b, h, w], in nats
    # An ignored pixel gets an arbitrary class's weight, but its pixel weight is 0.
    weights = pixel_weights * jnp.take(jnp.ravel(class_weights), labels, mode="clip")  # [b, h, w]
    if top_k_fraction < 1:
        hardest_first = jnp.sort(
            jax.lax.stop_gradient(jnp.where(valid, loss, -jnp.inf)), axis=None, descending=True
        )
        k = jnp.ceil(top_k_fraction * jnp.sum(valid)).astype(jnp.int32)
        keep = loss >= hardest_first[jnp.maximum(k - 1, 0)]
        loss, weights = jnp.where(keep, loss, 0), jnp.where(keep, weights, 0)
    return _ratio(jnp.sum(loss), jnp.sum(weights))


def focal(
    logits: ArrayLike, labels: ArrayLike, *, gamma: Number = 2.0, class_weights: Weights = None
) -> Float[Array, ""]:
    """Returns the focal loss, which down-weights well-classified pixels, in nats per pixel.

    The loss is (sum w[y] (1 - p[y])^gamma (-log p[y])) / (sum w[y]) over the valid pixels. y is a
    pixel's label, p its softmax (not sigmoid) probabilities, and w the class weights, which Lin et
    al. 2017 call alpha ("Focal loss for dense object detection", section 3.2). gamma = 0 gives
    `cross_entropy`.
    """
    logits, target, valid = _prepare(logits, labels)
    class_weights = jnp.ravel(_class_weights(class_weights, logits))
    weights = jnp.where(valid, jnp.take(class_weights, labels, mode="clip"), 0)  # [b, h, w]
    log_p = jnp.sum(jax.nn.log_softmax(logits), axis=-1, where=target)  # [b, h, w], 0 if ignored
    loss = _power(-jnp.expm1(log_p), gamma) * -log_p
    return _ratio(jnp.sum(weights * loss), jnp.sum(weights))


def tversky(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: Number = 0.5,
    beta: Number = 0.5,
    gamma: Number = 1.0,
    class_weights: Weights = None,
    per: str = "batch",
    absent: str = "skip",
    smooth: Number = 0.0,
    squared: bool = False,
    include_background: bool = True,
) -> Float[Array, ""]:
    """Returns the mean over classes of (1 - Tversky index)^gamma, in [0, 1].

    index = (tp + smooth) / (tp + alpha fp + beta fn + smooth), where tp = sum p t,
    fp = sum p (1 - t) and fn = sum (1 - p) t (Salehi et al. 2017, "Tversky loss function", section
    2.2). The sums run over the valid pixels, p is the softmax probability of a class, and t is 1
    for pixels of the class and 0 elsewhere. If `squared`, fp = sum p^2 (1 - t) and
    fn = sum (1 - p)^2 t. The focal Tversky loss of Abraham and Khan 2019 has gamma = 3 / 4.

    per: "batch" sums over all pixels of the batch. "image" computes a loss for each (image, class)
      pair and averages these losses. Images without a valid pixel are excluded.
    absent: How to treat a class that is absent from the labels of the batch (or image). "skip"
      excludes the class from the mean. "zero" includes the class with loss 0. "one" applies the
      formula, which gives 1 for any false positive if smooth = 0.
    class_weights: The weights of the classes in the mean.
    include_background: Whether the mean includes class 0.
    """
    _check_choice("per", per, "batch", "image")
    _check_choice("absent", absent, "skip", "zero", "one")
    logits, target, valid = _prepare(logits, labels)
    probs = jax.nn.softmax(logits)
    error = jnp.where(target, 1 - probs, probs)
    if squared:
        error = error**2

    def count(x: Array, where: Array) -> Array:  # -> [b or 1, c], in pixels
        per_image = jnp.sum(x, axis=(1, 2), where=where)
        return per_image if per == "image" else jnp.sum(per_image, axis=0, keepdims=True)

    ones = jnp.ones_like(probs)
    true_positive = count(probs, target)
    missed = alpha * count(error, valid[..., None] & ~target) + beta * count(error, target)
    # Computing 1 - index as a single fraction is exact near 0. The lower bound of 1e-12 pixels
    # turns 0 / 0 into 0 and keeps 1 / x^2 in the gradient finite in float32. The bound is far below
    # any prediction that matters.
    loss = missed / jnp.maximum(true_positive + missed + smooth, 1e-12)
    loss = _power(loss, gamma)  # [b or 1, c]

    present = count(ones, target) > 0
    counts = present if absent == "skip" else count(ones, valid[..., None]) > 0
    if absent == "zero":
        loss = jnp.where(present, loss, 0)
    weights = jnp.where(counts, _class_weights(class_weights, logits)[0, 0], 0)
    if not include_background:
        weights = weights.at[:, 0].set(0)
    return _ratio(jnp.sum(weights * loss), jnp.sum(weights))


def soft_dice(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_weights: Weights = None,
    per: str = "batch",
    absent: str = "skip",
    smooth: Number = 0.0,
    squared: bool = False,
    include_background: bool = True,
) -> Float[Array, ""]:
    """Returns one minus the soft Dice coefficient, averaged over classes, in [0, 1].

    dice = (2 sum p t + smooth) / (sum p + sum t + smooth). If `squared`, sum p^2 replaces sum p
    (Milletari et al. 2016, "V-Net", section 3). Equal to `tversky` with alpha = beta = 1/2 and
    half of `smooth`. See `tversky` for p, t and the options.
    """
    return tversky(
        logits,
        labels,
        alpha=0.5,
        beta=0.5,
        class_weights=class_weights,
        per=per,
        absent=absent,
        smooth=smooth / 2,
        squared=squared,
        include_background=include_background,
    )


def soft_jaccard(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_weights: Weights = None,
    per: str = "batch",
    absent: str = "skip",
    smooth: Number = 0.0,
    squared: bool = False,
    include_background: bool = True,
) -> Float[Array, ""]:
    """Returns one minus the soft Jaccard index (IoU), averaged over classes, in [0, 1].

    jaccard = (sum p t + smooth) / (sum p + sum t - sum p t + smooth). If `squared`, sum p^2
    replaces sum p (Rahman and Wang 2016, "Optimizing intersection-over-union in deep neural
    networks"). Equal to `tversky` with alpha = beta = 1. See `tversky` for p, t and the options.
    """
    return tversky(
        logits,
        labels,
        alpha=1,
        beta=1,
        class_weights=class_weights,
        per=per,
        absent=absent,
        smooth=smooth,
        squared=squared,
        include_background=include_background,
    )


def dice_ce(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    ce_weight: Number = 1.0,
    dice_weight: Number = 1.0,
    class_weights: Weights = None,
    pixel_weights: ArrayLike | None = None,
    label_smoothing: Number = 0.0,
    per: str = "batch",
    absent: str = "skip",
    smooth: Number = 0.0,
    squared: bool = False,
    include_background: bool = True,
) -> Float[Array, ""]:
    """Returns ce_weight * cross_entropy + dice_weight * soft_dice.

    Class weights apply to both losses. Pixel weights and label smoothing apply only to the
    cross-entropy. The options after `label_smoothing` apply only to the Dice loss. The loss of
    nnU-Net is this sum minus 1 (Isensee et al. 2018).
    """
    ce = cross_entropy(
        logits,
        labels,
        class_weights=class_weights,
        pixel_weights=pixel_weights,
        label_smoothing=label_smoothing,
    )
    dice = soft_dice(
        logits,
        labels,
        class_weights=class_weights,
        per=per,
        absent=absent,
        smooth=smooth,
        squared=squared,
        include_background=include_background,
    )
    return ce_weight * ce + dice_weight * dice


def lovasz_softmax(
    logits: ArrayLike, labels: ArrayLike, *, class_weights: Weights = None, per: str = "batch"
) -> Float[Array, ""]:
    """Returns the Lovász-softmax loss, a convex surrogate of one minus IoU, in [0, 1].

    The loss is averaged over the classes that occur in the labels. The loss for one class is
    sum_i e_i (J_i - J_(i-1)) (Berman et al. 2018, "The Lovász-softmax loss", section 3). The pixels
    i are sorted by descending error e_i = |t_i - p_i| between the one-hot label t and the softmax
    p. J_i is the Jaccard loss if exactly the first i pixels are wrong.

    per="batch" sorts all pixels of the batch together. per="image" computes one loss per image and
    averages over the images with a valid pixel (`per_image` in the authors' code).
    """
    _check_choice("per", per, "batch", "image")
    logits, target, valid = _prepare(logits, labels)
    probs = jax.nn.softmax(logits)
    error = jnp.where(target, 1 - probs, probs)
    # -1 is below every valid error, so ignored pixels come last, where J no longer changes.
    error = jnp.where(valid[..., None], error, -1)

    def flat(x: Array) -> Array:  # [b, h, w, c] -> [b or 1, c, pixels]
        return x.reshape(len(x) if per == "image" else 1, -1, x.shape[-1]).swapaxes(1, 2)

    negated, hit = jax.lax.sort((-flat(error), flat(target)), num_keys=1)
    size = jnp.sum(hit, axis=-1, keepdims=True)
    intersection = size - jnp.cumsum(hit, axis=-1)
    union = (size + jnp.cumsum(~hit, axis=-1)).astype(error.dtype)
    # Computes J_i - J_(i-1) in closed form, because subtraction loses precision for large images.
    step = jnp.where(hit, 1 / union, intersection / (union * jnp.maximum(union - 1, 1)))
    loss = jnp.sum(-negated * step, axis=-1)  # [b or 1, c]; 0 for an absent class

    weights = jnp.where(size[..., 0] > 0, _class_weights(class_weights, logits)[0, 0], 0)
    per_image = _ratio(jnp.sum(weights * loss, axis=1), jnp.sum(weights, axis=1))
    return _ratio(jnp.sum(per_image), jnp.sum(jnp.any(weights > 0, axis=1)))


def with_border_weights(
    loss: Callable[..., Float[Array, ""]], class_weights: Weights
) -> Callable[..., Float[Array, ""]]:
    """Returns a function of (logits, labels, border) that computes `loss` with border weights.

    border [b, h, w] is the field BORDER of `data.targets`. The weight of a pixel is w[y] + border,
    where y is its label and w the class weights (Ronneberger et al. 2015, "U-Net", section 3,
    equation 2). If w[y] is 0, the pixel has weight 0.
    """

    def weighted_loss(logits: Array, labels: Array, border: Array) -> Float[Array, ""]:
        weights = jnp.ravel(_class_weights(class_weights, logits))
        # An ignored pixel gets an arbitrary class's weight, but `loss` ignores the pixel.
        weights = jnp.take(weights, labels, mode="clip")
        # `loss` multiplies pixel weights by w[y].
        return loss(logits, labels, pixel_weights=1 + _ratio(border, weights))

    return weighted_loss


LOSSES: dict[str, Callable[..., Float[Array, ""]]] = {
    "cross_entropy": cross_entropy,
    "soft_dice": soft_dice,
    "dice_ce": dice_ce,
    "focal": focal,
    "soft_jaccard": soft_jaccard,
    "tversky": tversky,
    "lovasz_softmax": lovasz_softmax,
}


def _prepare(
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


def _class_weights(weights: Weights, logits: Float[Array, "b h w c"]) -> Float[Array, "1 1 1 c"]:
    num_classes = logits.shape[-1]
    weights = jnp.ones(num_classes) if weights is None else jnp.asarray(weights)
    if weights.shape != (num_classes,):
        raise ValueError(
            f"class_weights must be {num_classes} numbers, one per class, not {weights.shape}"
        )
    return weights.astype(logits.dtype).reshape(1, 1, 1, num_classes)


def _check_choice(name: str, value: object, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Returns numerator / denominator, or 0 with gradient 0 if the denominator is 0."""
    some = denominator > 0
    return jnp.where(some, numerator, 0) / jnp.where(some, denominator, 1)


def _power(base: Float[Array, "*d"], exponent: Number) -> Float[Array, "*d"]:
    """Returns base ** exponent for base >= 0. The gradient at 0 is 0, even for exponents < 1."""
    some = base > 0
    return jnp.where(some, jnp.where(some, base, 1) ** exponent, 0)
