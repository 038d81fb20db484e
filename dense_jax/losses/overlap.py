"""Losses of the overlap between the prediction and the label of each class."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from dense_jax.losses.common import (
    Number,
    Prepared,
    Weights,
    check_choice,
    power,
    prepare,
    ratio,
)
from dense_jax.losses.pixelwise import cross_entropy


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
    check_choice("per", per, "batch", "image")
    check_choice("absent", absent, "skip", "zero", "one")
    x = prepare(logits, labels)
    probs = x.probs
    error = jnp.where(x.target, 1 - probs, probs)
    if squared:
        error = error**2

    true_positive = count(probs, x.target, per)
    false_positive = count(error, x.valid[..., None] & ~x.target, per)
    missed = alpha * false_positive + beta * count(error, x.target, per)
    # Computing 1 - index as a single fraction is exact near 0. The lower bound of 1e-12 pixels
    # turns 0 / 0 into 0 and keeps 1 / x^2 in the gradient finite in float32. The bound is far below
    # any prediction that matters.
    loss = missed / jnp.maximum(true_positive + missed + smooth, 1e-12)
    loss = power(loss, gamma)  # [b or 1, c]
    weights = x.weights(class_weights, include_background=include_background)
    return mean_over_classes(loss, weights, x, per, absent)


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


def generalized_dice(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_weights: Weights = None,
    per: str = "batch",
    absent: str = "skip",
    smooth: Number = 0.0,
    include_background: bool = True,
) -> Float[Array, ""]:
    """Returns one minus the generalized Dice coefficient of all classes, in [0, 1].

    dice = (2 sum_k w_k sum p t + smooth) / (sum_k w_k (sum p + sum t) + smooth), where the weight
    of class k is w_k = 1 / (sum t)^2 (Sudre et al. 2017, "Generalised Dice overlap as a deep
    learning loss function for highly unbalanced segmentations", section 2.1).

    per, include_background: See `tversky`.
    absent: How to treat a class that is absent from the labels of the batch (or image). "skip"
      excludes the class. "one" gives the class the largest weight of the classes that occur, as
      MONAI does.
    class_weights: Factors on the weights of the classes.
    """
    check_choice("per", per, "batch", "image")
    check_choice("absent", absent, "skip", "one")
    x = prepare(logits, labels)
    probs, target = x.probs, x.target
    factors = x.weights(class_weights, include_background=include_background)[None]  # [1, c]
    size = count(jnp.ones_like(probs), target, per)  # [b or 1, c], in pixels
    weights = ratio((factors > 0).astype(size.dtype), size**2)
    if absent == "one":
        weights = jnp.where(size > 0, weights, jnp.max(weights, axis=1, keepdims=True))
    weights *= factors
    # The sum of p + t is twice the sum of p t plus the errors.
    error = count(jnp.where(target, 1 - probs, probs), x.valid[..., None], per)
    wrong = jnp.sum(weights * error, axis=1)
    right = jnp.sum(weights * count(probs, target, per), axis=1)
    loss = ratio(wrong, 2 * right + wrong + smooth)  # [b or 1]
    return ratio(jnp.sum(loss), jnp.sum(jnp.any(weights > 0, axis=1)))


def cldice(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    iterations: int = 3,
    class_weights: Weights = None,
    per: str = "batch",
    absent: str = "skip",
    smooth: Number = 1.0,
    include_background: bool = False,
) -> Float[Array, ""]:
    """Returns one minus the soft centerline Dice (clDice), averaged over classes, in [0, 1].

    clDice = 2 P R / (P + R). The precision P = (sum S(p) t + smooth) / (sum S(p) + smooth) is the
    share of the prediction's skeleton that lies in the label. R = (sum S(t) p + smooth) /
    (sum S(t) + smooth) is the share of the label's skeleton that is predicted. S is `soft_skeleton`
    (Shit et al. 2021, "clDice", arXiv 2003.07311, section 3). The loss is for thin structures, and
    is usually added to `soft_dice`.

    iterations: The number of erosions; at least the largest radius of the structures, in pixels.
    per, absent, class_weights, include_background: See `tversky`.
    """
    check_choice("per", per, "batch", "image")
    check_choice("absent", absent, "skip", "zero", "one")
    x = prepare(logits, labels)
    mask, probs, target = x.valid[..., None], x.probs, x.target
    skeleton = soft_skeleton(probs, mask, iterations)
    label_skeleton = soft_skeleton(target.astype(probs.dtype), mask, iterations)

    def share(part: Array, whole: Array) -> Array:  # of pixels, at least 1e-12 as in `tversky`
        return (part + smooth) / jnp.maximum(whole + smooth, 1e-12)

    precision = share(count(skeleton, target, per), count(skeleton, mask, per))
    recall = share(count(label_skeleton * probs, mask, per), count(label_skeleton, mask, per))
    loss = 1 - ratio(2 * precision * recall, precision + recall)  # [b or 1, c]
    weights = x.weights(class_weights, include_background=include_background)
    return mean_over_classes(loss, weights, x, per, absent)


def soft_skeleton(
    x: Float[Array, "b h w c"], valid: Bool[Array, "b h w 1"], iterations: int
) -> Float[Array, "b h w c"]:
    """Returns the soft skeleton of values in [0, 1] (clDice paper, algorithm 1).

    It holds what an opening removes from x, or from x after 1 to `iterations` erosions. Ignored
    pixels are treated like pixels beyond the border of the image.
    """

    def largest(x: Array, *window: int) -> Array:  # of the pixels around each pixel
        window, strides = (1, *window, 1), (1, 1, 1, 1)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "SAME")

    def erode(x: Array) -> Array:  # by a cross
        negated = jnp.where(valid, -x, -1)
        return -jnp.maximum(largest(negated, 3, 1), largest(negated, 1, 3))

    def removed(x: Array) -> Array:  # by an erosion and a dilation by a square
        rest = x - largest(jnp.where(valid, erode(x), 0), 3, 3)
        # Where nothing is removed, XLA may fuse x into the difference and get a rounding error
        # instead of 0, differently in the value and in the gradient.
        return jnp.where(rest > 1e-6, rest, 0)

    skeleton = removed(x)
    for _ in range(iterations):
        x = erode(x)
        skeleton += (1 - skeleton) * removed(x)
    return skeleton


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
    check_choice("per", per, "batch", "image")
    x = prepare(logits, labels)
    probs = x.probs
    error = jnp.where(x.target, 1 - probs, probs)
    # -1 is below every valid error, so ignored pixels come last, where J no longer changes.
    error = jnp.where(x.valid[..., None], error, -1)

    def flat(x: Array) -> Array:  # [b, h, w, c] -> [b or 1, c, pixels]
        return x.reshape(len(x) if per == "image" else 1, -1, x.shape[-1]).swapaxes(1, 2)

    negated, hit = jax.lax.sort((-flat(error), flat(x.target)), num_keys=1)
    size = jnp.sum(hit, axis=-1, keepdims=True)
    intersection = size - jnp.cumsum(hit, axis=-1)
    union = (size + jnp.cumsum(~hit, axis=-1)).astype(error.dtype)
    # Computes J_i - J_(i-1) in closed form, because subtraction loses precision for large images.
    step = jnp.where(hit, 1 / union, intersection / (union * jnp.maximum(union - 1, 1)))
    loss = jnp.sum(-negated * step, axis=-1)  # [b or 1, c]; 0 for an absent class

    weights = jnp.where(size[..., 0] > 0, x.weights(class_weights)[None], 0)
    per_image = ratio(jnp.sum(weights * loss, axis=1), jnp.sum(weights, axis=1))
    return ratio(jnp.sum(per_image), jnp.sum(jnp.any(weights > 0, axis=1)))


def count(
    x: Float[Array, "b h w c"], where: Bool[Array, "b h w _"], per: str
) -> Float[Array, "n c"]:
    """Returns the sum over the pixels of the batch (n = 1), or of each image (n = b)."""
    per_image = jnp.sum(x, axis=(1, 2), where=where)
    return per_image if per == "image" else jnp.sum(per_image, axis=0, keepdims=True)


def mean_over_classes(
    loss: Float[Array, "n c"], weights: Float[Array, " c"], x: Prepared, per: str, absent: str
) -> Float[Array, ""]:
    """Returns the mean of the losses of classes (and images). See `tversky` for the options."""
    ones = jnp.ones(x.target.shape, loss.dtype)
    present = count(ones, x.target, per) > 0
    counts = present if absent == "skip" else count(ones, x.valid[..., None], per) > 0
    if absent == "zero":
        loss = jnp.where(present, loss, 0)
    weights = jnp.where(counts, weights[None], 0)
    return ratio(jnp.sum(weights * loss), jnp.sum(weights))
