"""Tests losses against finite differences, and their properties.

test_conformance.py compares losses with other libraries, and test_sharding.py across devices.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import ndimage

from benchmarks.conformance import golden_input
from dense_jax import regions
from dense_jax.data.targets import signed_distances
from dense_jax.labels import IGNORE_LABEL
from dense_jax.losses import LOSSES, cross_entropy, terms, total, with_border_weights
from dense_jax.losses.overlap import soft_skeleton


def distances_like(labels, num_classes=3):
    """Distances of the right signs: 0 where an image lacks the class, NaN at ignored pixels."""
    classes, labels = jnp.arange(num_classes)[None, None, None], jnp.asarray(labels)
    if labels.ndim == 4:  # masks of regions
        target, valid = labels == 1, (labels <= 1).all(axis=-1, keepdims=True)
    else:
        target = labels[..., None] == classes
        valid = target.any(axis=-1, keepdims=True)
    distances = jnp.where(target, -0.5 - classes, 2.0 + classes)
    distances = jnp.where(target.any(axis=(1, 2), keepdims=True), distances, 0)
    return jnp.where(valid, distances, jnp.nan)


REGIONS = regions.read(["0", "1", "2"], {"all": ["1", "2"], "core": ["2"], "rim": ["0", "2"]})


def masks_of(labels):
    return jnp.asarray(REGIONS.table)[labels]


def loss_of(text, *, targets=jnp.asarray, **options):
    """Returns the function (logits, labels) of a loss or a sum, with distances if it needs them.

    targets: Returns what the loss gets as labels, such as the masks of REGIONS.
    """
    loss = total(terms(text), options, ["distances"])

    def with_fields(logits, labels):
        labels = targets(labels)
        return loss(logits, labels, distances=distances_like(labels, jnp.shape(logits)[-1]))

    return with_fields


# Every loss with its defaults, also those to come, and the options that take another path.
VARIANTS = [
    *((name, {}) for name in LOSSES),
    ("cross_entropy", {"class_weights": (1, 2, 4), "label_smoothing": 0.1}),
    ("cross_entropy", {"top_k_fraction": 0.5}),
    ("focal", {"gamma": 0.5, "class_weights": [1.0, 2.0, 4.0]}),
    ("soft_dice", {"per": "image", "absent": "zero", "smooth": 1, "squared": True}),
    ("soft_dice", {"absent": "one", "squared": True}),
    ("soft_jaccard", {"per": "image", "absent": "one", "class_weights": np.array([1, 2, 4])}),
    ("tversky", {"alpha": 0.3, "beta": 0.7, "gamma": 0.75, "include_background": False}),
    ("dice_ce", {"per": "image", "ce_weight": 0.5, "dice_weight": 2.0, "label_smoothing": 0.1}),
    ("lovasz_softmax", {"per": "image", "class_weights": (1, 2, 4)}),
    (
        "generalized_dice",
        {"per": "image", "absent": "one", "smooth": 1, "class_weights": (1, 2, 4)},
    ),
    ("generalized_dice", {"include_background": False}),
    ("cldice", {"per": "image", "absent": "one", "iterations": 1, "include_background": True}),
    ("cldice", {"smooth": 0, "class_weights": (1, 2, 4)}),
    ("boundary", {"class_weights": (1, 2, 4), "include_background": False}),
    (" + 3 * ".join(LOSSES), {}),
    ("generalized_dice + 0.01 * (boundary + cldice(smooth=0.5))", {"class_weights": (1, 2, 4)}),
]
MODES = {"softmax": jnp.asarray, "regions": masks_of}
_FUNCTIONS = [
    pytest.param(loss_of(text, targets=targets, **options), id=f"{mode}-{text}-{','.join(options)}")
    for text, options in VARIANTS
    for mode, targets in MODES.items()
]
every_variant = pytest.mark.parametrize("loss", _FUNCTIONS)
every_loss = pytest.mark.parametrize("loss", _FUNCTIONS[: len(MODES) * len(LOSSES)])


# Most of these tests' time is compilation: the tests of a variant share one function per shape.
compiled = functools.cache(lambda loss: jax.jit(jax.value_and_grad(loss)))


def value_and_grad(loss, logits, labels):
    value, gradient = compiled(loss)(jnp.asarray(logits), jnp.asarray(labels))
    return float(value), np.asarray(gradient)


@every_variant
def test_gradient_equals_finite_differences(loss):
    _, labels = golden_input("ign")
    labels = labels[:, :2, 2:]
    with jax.enable_x64(True):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 3)))
        step = 1e-5 * jnp.eye(logits.size).reshape(-1, *logits.shape)
        nearby = jnp.concatenate([logits[None] + step, logits[None] - step, logits[None]])
        values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss), (0, None)))(nearby, labels)
    assert values.dtype == jnp.float64
    above, below = np.split(np.asarray(values[:-1]), 2)
    numeric = ((above - below) / 2e-5).reshape(logits.shape)
    assert np.any(numeric)
    np.testing.assert_allclose(gradients[-1], numeric, atol=1e-9, rtol=1e-6)


# 1. segmentation_models.pytorch#366: ignore_index had no effect in the Dice loss
# 6. PaddleSeg#2270, kornia#839: the one-hot of label 255 crashes or reads out of bounds
# 13. MONAI#8734: no ignore_index in the losses
@every_variant
def test_ignored_pixels_have_no_value_and_no_gradient(loss):
    logits, labels = golden_input("ign")
    expected, _ = value_and_grad(loss, logits, labels)
    ignored = labels == IGNORE_LABEL
    for garbage in (np.nan, np.inf, -np.inf, 1e30):
        logits[ignored] = garbage
        for other in (IGNORE_LABEL, -1, 3):  # all outside the three classes
            labels[ignored] = other
            value, gradient = value_and_grad(loss, logits, labels)
            assert value == expected
            assert not np.any(gradient[ignored])
            assert np.all(np.isfinite(gradient)) and np.any(gradient)


# 3. MMSegmentation#2996: Dice loss 0.5 where all pixels are ignored
# 5. pytorch#70348, #116349, #75181: cross-entropy is NaN where all pixels are ignored
@every_variant
def test_without_a_valid_pixel_loss_and_gradient_are_zero(loss):
    logits, labels = golden_input("full")
    logits[0] = np.nan
    value, gradient = value_and_grad(loss, logits, np.full_like(labels, IGNORE_LABEL))
    assert value == 0 and not np.any(gradient)


# 11. MONAI research-contributions#27: NaN from squared Dice with tiny denominators
@every_variant
def test_saturated_logits_have_finite_gradients(loss):
    rng = np.random.default_rng(0)
    _, labels = golden_input("abs")  # a class without a pixel, too
    right = np.eye(3)[labels] * 2e4 - 1e4
    for logits in (right, -right, 1e4 * rng.choice([-1, 1], right.shape), right * 3e-3):
        value, gradient = value_and_grad(loss, logits.astype(np.float32), labels)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


@every_loss
def test_one_pixel(loss):
    for label in (0, 1, 2):
        logits = np.float32([[[[100.0, -3.0, 0.0]]]])
        value, gradient = value_and_grad(loss, logits, np.full((1, 1, 1), label))
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


# 4. MMSegmentation#886, #1409: cross-entropy is averaged over ignored pixels too
@every_variant
def test_order_and_ignored_images_change_nothing(loss):
    """A padded evaluation batch, or a last batch, must not weigh differently."""
    logits, labels = golden_input("img")
    value, gradient = value_and_grad(loss, logits, labels)
    padded, padded_gradient = value_and_grad(
        loss,
        np.concatenate([logits[1:], np.full_like(logits[:1], np.nan), logits[:1]]),
        np.concatenate([labels[1:], np.full_like(labels[:1], IGNORE_LABEL), labels[:1]]),
    )
    assert padded == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(padded_gradient[::-2], gradient, rtol=1e-5, atol=1e-8)
    assert not np.any(padded_gradient[1])


# 10. segmentation_models.pytorch#463, ultralytics#24554: sums of float16 overflow beyond 65504
@every_loss
def test_half_precision_sums_are_float32(loss):
    """An image of 512 x 512 pixels has more pixels than float16 can count."""
    logits, labels = (x[:1, :, :4] for x in golden_input("ign"))
    logits, labels = np.tile(np.float16(logits), (1, 128, 128, 1)), np.tile(labels, (1, 128, 128))
    with jax.enable_x64(True):
        expected = float(jax.jit(loss)(jnp.float64(logits), labels))
    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits), labels)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.float16
    assert value == pytest.approx(expected, rel=1e-5)
    assert jnp.all(jnp.isfinite(gradient)) and jnp.any(gradient)


# 2. MMSegmentation#1088: ignored pixels are in the Dice loss's denominator
@pytest.mark.parametrize(
    "name",
    ["soft_dice", "soft_jaccard", "tversky", "lovasz_softmax", "generalized_dice", "cldice"],
)
def test_perfect_prediction_costs_nothing_beside_ignored_pixels(name):
    """Ignored pixels must not be in the denominator."""
    _, labels = golden_input("ign")
    logits = np.where(labels[..., None] == np.arange(3), 1e4, -1e4)
    logits[labels == IGNORE_LABEL] = [1e4, 0, 0]
    for per in ("batch", "image"):
        assert LOSSES[name](logits, labels, per=per) == 0


# 9. segmentation_models.pytorch#500, pytorch-toolbelt#59: Dice pooled over all classes
def test_missing_a_rare_class_costs_its_share_of_the_classes():
    """Dice is averaged per class, not summed over the pixels of all classes together."""
    labels = np.zeros((1, 10, 10), np.int32)
    labels[0, 0, 0] = 1
    logits = np.broadcast_to([1e4, -1e4], (1, 10, 10, 2))
    assert LOSSES["soft_dice"](logits, labels) == pytest.approx((1 + 1 / 199) / 2, rel=1e-5)


# 7. segmentation_models.pytorch#1169, ivadomed#183: what Dice is for an absent class
def test_absent_class_policies():
    """Skipped, or a loss of 0 in the mean, or the formula: 1 for any false positive."""
    logits, labels = golden_input("abs")
    skip, zero, one = (
        float(LOSSES["soft_dice"](logits, labels, absent=absent))
        for absent in ("skip", "zero", "one")
    )
    assert zero == pytest.approx(skip * 2 / 3) and one == pytest.approx((skip * 2 + 1) / 3)
    assert LOSSES["soft_dice"](logits, labels, absent="one", smooth=1e9) < 1e-6


# 12. nnU-Net#1395: training with Dice alone ends, by bad luck, without the rare class
@pytest.mark.parametrize("per", ["batch", "image"])
def test_dice_alone_finds_a_rare_class_from_every_seed(per):
    """A linear model of each pixel, 1 % of them positive, and some images without any.

    From these 8 seeds cross-entropy never does, nor one Dice of the pixels of both classes.
    """
    features = np.random.default_rng(0).normal(size=(4, 32, 32, 8)).astype(np.float32)
    features[..., 7] = 1  # for a bias
    labels = (features[..., 0] > np.quantile(features[..., 0], 0.99)).astype(np.int32)
    labels[:2] = 0
    loss = functools.partial(LOSSES["soft_dice"], labels=labels, per=per)
    optimizer = optax.adam(0.05)

    def train(key):
        def step(carry, _):
            weights, state = carry
            gradient = jax.grad(lambda w: loss(features @ w))(weights)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(weights, updates), state), None

        weights = jax.random.normal(key, (8, 2))
        (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), length=300)
        return jnp.argmax(features @ weights, axis=-1)

    for found in jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 8)) == 1:
        assert 2 * np.sum(found & (labels == 1)) / (np.sum(found) + np.sum(labels)) > 0.5


# 15. optax: generalized Dice collapses where a class is absent
def test_an_absent_class_does_not_decide_the_loss():
    """Weights of 1 / pixels^2 leave nothing to the classes present: exchanging them is free."""
    logits, labels = golden_input("abs")
    exchanged = logits[..., [1, 0, 2]]
    loss = optax.losses.multiclass_generalized_dice_loss
    with jax.numpy_rank_promotion("allow"):
        theirs = [loss(x, jax.nn.one_hot(labels, 3)) for x in (logits, exchanged)]
    assert theirs[0] == pytest.approx(float(theirs[1]), rel=1e-6)
    for name in ("soft_dice", "generalized_dice"):
        ours = [float(LOSSES[name](x, labels)) for x in (logits, exchanged)]
        assert abs(ours[0] - ours[1]) > 0.03


# 8. MONAI#807: Dice per image trains less stably than Dice per batch
def test_dice_per_image_and_per_batch_differ_and_agree_on_one_image():
    logits, labels = golden_input("img")
    values = [
        [float(LOSSES["soft_dice"](x, y, per=per)) for per in ("batch", "image")]
        for x, y in [(logits, labels), (logits[:1], labels[:1])]
    ]
    assert abs(values[0][0] - values[0][1]) > 0.005
    assert values[1][0] == pytest.approx(values[1][1], rel=1e-6)


def test_losses_are_special_cases_of_each_other():
    x = golden_input("ign")
    same = [
        (LOSSES["focal"](*x, gamma=0), LOSSES["cross_entropy"](*x)),
        (LOSSES["tversky"](*x), LOSSES["soft_dice"](*x)),
        (LOSSES["tversky"](*x, alpha=1, beta=1), LOSSES["soft_jaccard"](*x)),
        (LOSSES["dice_ce"](*x, ce_weight=0), LOSSES["soft_dice"](*x)),
        (LOSSES["dice_ce"](*x, dice_weight=0), LOSSES["cross_entropy"](*x)),
        (
            LOSSES["cross_entropy"](*x, pixel_weights=np.choose(x[1] % 254, [1, 2, 4])),
            LOSSES["cross_entropy"](*x, class_weights=(1, 2, 4)),
        ),
    ]
    for one, other in same:
        assert one == pytest.approx(float(other), rel=1e-6)


def test_focal_and_focal_tversky_formulas():
    logits, labels = (x[:1, :1, :1] for x in golden_input("full"))
    p = np.exp(logits[0, 0, 0]) / np.exp(logits[0, 0, 0]).sum()
    p_y = p[labels[0, 0, 0]]
    assert LOSSES["focal"](logits, labels) == pytest.approx((1 - p_y) ** 2 * -math.log(p_y))
    index = p_y / (p_y + 0.7 * (1 - p_y))
    ours = LOSSES["tversky"](logits, labels, alpha=0.3, beta=0.7, gamma=0.75)
    assert ours == pytest.approx((1 - index) ** 0.75)


def test_top_k_counts_valid_pixels_only():
    logits, labels = golden_input("ign")
    valid = labels != IGNORE_LABEL
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = np.sort(-np.take_along_axis(log_p[valid], labels[valid][:, None], 1)[:, 0])
    for fraction, k in [(1, 33), (0.5, 17), (0.1, 4), (1e-6, 1)]:
        ours = LOSSES["cross_entropy"](logits, labels, top_k_fraction=fraction)
        assert ours == pytest.approx(nll[-k:].mean(), rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@every_loss
def test_half_precision_logits_give_a_float32_loss(loss, dtype):
    logits, labels = golden_input("ign")
    value = loss(jnp.asarray(logits, dtype), labels)
    assert value.dtype == jnp.float32
    assert value == loss(jnp.asarray(logits, dtype).astype(jnp.float32), labels)


def test_pixel_weights_may_be_anything_where_ignored():
    logits, labels = golden_input("ign")
    weights = np.where(labels == IGNORE_LABEL, np.nan, 2.0)
    ours = LOSSES["cross_entropy"](logits, labels, pixel_weights=weights)
    assert ours == pytest.approx(float(LOSSES["cross_entropy"](logits, labels)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_integer_labels_of_any_width(dtype):
    logits, labels = golden_input("ign")
    ours = LOSSES["cross_entropy"](logits, labels.astype(dtype))
    assert ours == LOSSES["cross_entropy"](logits, labels)


# 14. segmentation_models.pytorch#323, #542, #889: one-hot or index labels, which layout?
@pytest.mark.parametrize("name", LOSSES)
def test_wrong_input_is_an_error_that_says_what_was_expected(name):
    logits, labels = golden_input("full")
    fields = {field: np.zeros(logits.shape) for field in terms(name)[0].fields}
    for wrong, message in [
        ((logits[0], labels), r"logits must be floats \[b, h, w, c\], not float32 \(4, 5, 3\)"),
        ((labels, labels), r"logits must be floats \[b, h, w, c\], not int32 \(2, 4, 5\)"),
        ((logits.transpose(0, 3, 1, 2), labels), r"integers \(2, 3, 4\).*not int32 \(2, 4, 5\)"),
        ((logits, labels[..., None]), r"integers \(2, 4, 5\).*not int32 \(2, 4, 5, 1\)"),
        ((logits, labels.astype(np.float32)), r"integers \(2, 4, 5\).*not float32"),
        ((np.zeros((1, 1, 1, 256)), np.zeros((1, 1, 1), int)), "256 classes.* at most 255"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(LOSSES[name], **fields), *wrong)
    if "class_weights" in terms(name)[0].accepted:
        with pytest.raises(ValueError, match=r"3 numbers, one per class, not \(2,\)"):
            loss_of(name, class_weights=(1, 2))(logits, labels)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("soft_dice", {"per": "x"}, "per must be one of batch, image, not 'x'"),
        ("lovasz_softmax", {"per": "x"}, "per must be one of batch, image, not 'x'"),
        ("soft_jaccard", {"absent": "x"}, "absent must be one of skip, zero, one, not 'x'"),
        ("cross_entropy", {"label_smoothing": 2}, "label_smoothing must be in .*, not 2"),
        ("cross_entropy", {"top_k_fraction": 0}, "top_k_fraction must be in .*, not 0"),
        ("cross_entropy", {"pixel_weights": np.ones(3)}, r"\(2, 4, 5\), not \(3,\)"),
        ("generalized_dice", {"absent": "zero"}, "absent must be one of skip, one, not 'zero'"),
        ("cldice", {"per": "x"}, "per must be one of batch, image, not 'x'"),
        ("boundary", {"distances": np.ones(3)}, r"shape \(2, 4, 5, 3\), not \(3,\)"),
    ],
)
def test_wrong_options_are_errors_that_list_the_right_ones(name, options, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name](*golden_input("full"), **options)


@pytest.mark.parametrize("class_weights", [None, (2.0, 0.5, 3.0), (2.0, 0.0, 3.0)], ids=str)
def test_the_border_is_added_to_the_class_weight(class_weights):
    """sum (w + border) nll / sum (w + border); a class of weight 0 keeps it, whatever its border."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 6, 3))
    labels = rng.integers(0, 3, (2, 5, 6))
    border = rng.uniform(0, 10, (2, 5, 6))
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    nll = -np.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    weights = np.array(class_weights or (1.0, 1.0, 1.0))[labels]
    weights = np.where(weights > 0, weights + border, 0)
    labels[0, 0] = IGNORE_LABEL
    weights[0, 0] = 0
    loss = functools.partial(cross_entropy, class_weights=class_weights)
    loss = with_border_weights(loss, class_weights)
    result = loss(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), jnp.asarray(border))
    np.testing.assert_allclose(result, np.sum(weights * nll) / np.sum(weights), rtol=1e-5)


# The skeleton of the labels is an array of floats anyway.
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cldice"])
def test_no_one_hot_of_floats_is_made(name):
    """Neither in the value nor in the gradient are the labels' comparisons turned into numbers."""
    shapes = jax.ShapeDtypeStruct((2, 4, 5, 3), "float32"), jax.ShapeDtypeStruct((2, 4, 5), "int32")
    text = jax.jit(jax.value_and_grad(loss_of(name))).lower(*shapes).as_text()
    assert "tensor<2x4x5x3xi1>" in text
    assert not re.search(r"stablehlo.convert .*tensor<2x4x5x3xi1>\) -> tensor<2x4x5x3xf", text)


def test_a_sum_is_the_weighted_sum_of_its_terms():
    x = golden_input("ign")
    both = LOSSES["cross_entropy"](*x) + 3 * LOSSES["soft_dice"](*x)
    for text in (
        "cross_entropy + 3 * soft_dice",
        "3.0*soft_dice+cross_entropy",
        "0.5 * (2 * cross_entropy + 6 * tversky(alpha=0.5, beta=0.5)) + 0 * focal",
        "dice_ce(dice_weight=3)",
    ):
        assert loss_of(text)(*x) == pytest.approx(float(both), rel=1e-6)
    # A term alone is the loss itself, to the last bit.
    assert loss_of("dice_ce", smooth=1.0)(*x) == LOSSES["dice_ce"](*x, smooth=1.0)


def test_options_are_for_the_terms_that_have_them_and_a_term_has_the_last_word():
    x, weights = golden_input("abs"), (1.0, 2.0, 4.0)
    options = {"class_weights": weights, "absent": "one", "gamma": None, "label_smoothing": 0.1}
    ours = loss_of(
        "cross_entropy + soft_dice(class_weights=None) + tversky(absent='zero')", **options
    )
    expected = (
        LOSSES["cross_entropy"](*x, class_weights=weights, label_smoothing=0.1)
        + LOSSES["soft_dice"](*x, absent="one")
        + LOSSES["tversky"](*x, class_weights=weights, absent="zero")
    )
    assert ours(*x) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        *("", "cross_entropy +", "cross_entropy - focal", "-1 * focal", "focal * 2", "2", "2 * 3"),
        *("focal(2)", "focal(gamma=x)", "focal(gamma=1, gamma=2)", "a.focal", "'focal'"),
    ],
)
def test_what_is_no_sum_is_refused_with_the_list_of_losses(text):
    with pytest.raises(ValueError, match=r"must be a loss, or a sum .*; the losses are cross_entr"):
        terms(text)


def test_an_unknown_term_is_refused_with_the_list_of_losses():
    with pytest.raises(ValueError, match=r"loss='dise' is not one of cross_entropy, soft_dice, "):
        terms("cross_entropy + 3 * dise")


def test_a_term_without_its_field_is_left_out():
    """In evaluation, where there are only labels."""
    x = golden_input("ign")
    parsed = terms("cross_entropy + 3 * boundary")
    assert total(parsed)(*x) == LOSSES["cross_entropy"](*x)
    assert jnp.isnan(total(parsed[1:])(*x))
    with pytest.raises(TypeError, match="distances"):
        LOSSES["boundary"](*x)


def test_border_weights_are_for_the_terms_with_pixel_weights():
    logits, labels = golden_input("ign")
    border, weights = np.random.default_rng(0).uniform(0, 10, labels.shape), (1.0, 2.0, 4.0)
    options = {"class_weights": weights}
    loss = total(
        terms("cross_entropy(class_weights=None) + soft_dice + dice_ce"), options, ["border"]
    )
    x = jnp.asarray(logits), jnp.asarray(labels)
    plain, weighted = cross_entropy, functools.partial(cross_entropy, class_weights=weights)
    expected = (
        with_border_weights(plain, None)(*x, jnp.asarray(border))
        + with_border_weights(weighted, weights)(*x, jnp.asarray(border))
        + 2 * LOSSES["soft_dice"](*x, class_weights=weights)
    )
    assert loss(*x, border=jnp.asarray(border)) == pytest.approx(float(expected), rel=1e-6)


def softmax(logits):
    p = np.exp(np.float64(logits))
    return p / p.sum(axis=-1, keepdims=True)


def tubes(seed):
    """Returns logits [2, 12, 14, 2] and labels with two crossing tubes in each image."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((2, 12, 14), np.int32)
    labels[0, 2:5], labels[0, :, 6:8], labels[1, :, 3], labels[1, 7:12] = 1, 1, 1, 1
    logits = rng.normal(size=(*labels.shape, 2)) + 2 * np.eye(2)[labels]
    return np.float32(logits), labels


def skeleton_by_scipy(x, iterations):
    """Algorithm 1 of the clDice paper for one image [h, w]; nothing beyond its border matters."""
    cross = ndimage.generate_binary_structure(2, 1)

    def erode(x):
        return ndimage.grey_erosion(x, footprint=cross, mode="constant", cval=np.inf)

    def removed(x):
        return np.maximum(
            x - ndimage.grey_dilation(erode(x), size=(3, 3), mode="constant", cval=-np.inf), 0
        )

    skeleton = removed(x)
    for _ in range(iterations):
        x = erode(x)
        skeleton = skeleton + np.maximum(removed(x) - skeleton * removed(x), 0)
    return skeleton


@pytest.mark.parametrize("iterations", [1, 3])
def test_cldice_equals_its_formula(iterations):
    """MONAI's SoftclDiceLoss and the authors' code score the batch as one, for two classes."""
    logits, labels = tubes(0)
    p, t = softmax(logits)[..., 1], np.float64(labels)
    skeletons = [np.stack([skeleton_by_scipy(x, iterations) for x in images]) for images in (p, t)]
    precision = ((skeletons[0] * t).sum() + 1) / (skeletons[0].sum() + 1)
    recall = ((skeletons[1] * p).sum() + 1) / (skeletons[1].sum() + 1)
    ours = LOSSES["cldice"](logits, labels, iterations=iterations)
    expected = 1 - 2 * precision * recall / (precision + recall)
    assert ours == pytest.approx(expected, rel=1e-5)


def test_a_skeleton_is_thin_and_ends_at_ignored_pixels_as_at_the_border():
    image = np.zeros((1, 9, 20, 1), np.float32)
    image[:, 3:6] = 1
    valid = np.ones((1, 9, 20, 1), bool)
    skeleton = soft_skeleton(jnp.asarray(image), jnp.asarray(valid), 3)
    np.testing.assert_array_equal(skeleton[0, :, 3:-3, 0].sum(axis=0), 1)  # the middle row
    valid[:, :, 12:] = False
    cut = soft_skeleton(jnp.asarray(image), jnp.asarray(valid), 3)[:, :, :12]
    alone = soft_skeleton(jnp.asarray(image[:, :, :12]), jnp.asarray(valid[:, :, :12]), 3)
    np.testing.assert_array_equal(cut, alone)


def test_cldice_prefers_a_connected_tube():
    """A gap costs more than as many pixels missing at the tube's side, which Dice cannot tell."""
    labels = np.zeros((1, 9, 24), np.int32)
    labels[:, 3:6] = 1
    gap, side = labels.copy(), labels.copy()
    gap[:, 3:6, 11:13], side[:, 3, 4:10] = 0, 0
    losses = {
        name: [float(LOSSES[name](1e4 * np.float32(np.eye(2)[x]), labels)) for x in (gap, side)]
        for name in ("soft_dice", "cldice")
    }
    assert losses["soft_dice"][0] == pytest.approx(losses["soft_dice"][1])
    assert losses["cldice"][0] > losses["cldice"][1] + 0.01


@pytest.mark.parametrize("case", ["full", "ign"])
def test_boundary_loss_is_the_authors_mean_of_products(case):
    """SurfaceLoss and one_hot2dist of LIVIAETS/boundary-loss; ignored pixels are left out."""
    logits, labels = golden_input(case)
    p, maps = softmax(logits), np.zeros(logits.shape)
    for image, label in zip(maps, labels, strict=True):
        for k in range(3):
            inside, others = label == k, (label != k) & (label != IGNORE_LABEL)
            outer = ndimage.distance_transform_edt(~inside)
            image[..., k] = np.where(inside, 1 - ndimage.distance_transform_edt(~others), outer)
    ours = np.stack([signed_distances(label, 3) for label in labels])
    valid = labels != IGNORE_LABEL
    expected = (p * maps)[valid].mean()
    assert LOSSES["boundary"](logits, labels, distances=ours) == pytest.approx(expected, rel=1e-3)
    without = LOSSES["boundary"](logits, labels, distances=ours, include_background=False)
    assert without == pytest.approx((p * maps)[valid][:, 1:].mean(), rel=1e-3)


def test_boundary_loss_leaves_absent_classes_out():
    logits, labels = golden_input("abs")
    distances = np.stack([signed_distances(label, 3) for label in labels])
    assert not distances[..., 2].any()
    expected = (softmax(logits) * distances)[..., :2].mean()
    assert LOSSES["boundary"](logits, labels, distances=distances) == pytest.approx(expected)


def test_generalized_dice_equals_its_formula():
    """Sudre et al. 2017, section 2.1, over the classes that occur."""
    logits, labels = golden_input("abs")
    p, t = softmax(logits)[..., :2], np.eye(3)[labels][..., :2]
    weights = 1 / t.sum(axis=(0, 1, 2)) ** 2
    fraction = (weights * p * t).sum() / (weights * (p + t)).sum()
    assert LOSSES["generalized_dice"](logits, labels) == pytest.approx(1 - 2 * fraction, rel=1e-6)
