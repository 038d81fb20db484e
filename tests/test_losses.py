"""Losses: against other libraries' values, against finite differences, and by their properties."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dense_jax.labels import IGNORE_LABEL
from dense_jax.losses import LOSSES, cross_entropy, with_border

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
]
_FUNCTIONS = [
    pytest.param(functools.partial(LOSSES[name], **options), id=f"{name}-{','.join(options)}")
    for name, options in VARIANTS
]
every_variant = pytest.mark.parametrize("loss", _FUNCTIONS)
every_loss = pytest.mark.parametrize("loss", _FUNCTIONS[: len(LOSSES)])


def golden_input(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits [2, 4, 5, 3] and labels: all classes, some pixels ignored, or a class absent."""
    n, h, w, c = np.indices((2, 4, 5, 3))
    logits = (2 * np.sin(0.7 * n + 1.3 * h + 0.9 * w + 2.1 * c)).astype(np.float32)
    n, h, w = np.indices((2, 4, 5))
    labels = (n + h * w + h) % 3
    if case == "ign":
        labels[0, 0, :] = labels[1, 3, 1:3] = IGNORE_LABEL
    elif case == "abs":
        labels[labels == 2] = 0
    elif case == "img":  # class 1 is absent from image 0 alone
        labels[0][labels[0] == 1] = 0
    return logits, labels.astype(np.int32)


# Most of these tests' time is compilation: the tests of a variant share one function per shape.
compiled = functools.cache(lambda loss: jax.jit(jax.value_and_grad(loss)))


def value_and_grad(loss, logits, labels):
    value, gradient = compiled(loss)(jnp.asarray(logits), jnp.asarray(labels))
    return float(value), np.asarray(gradient)


MONAI = {"per": "image", "absent": "one", "smooth": 1e-5}
NNUNET = {"absent": "one", "smooth": 1e-5, "include_background": False}
CASES = ("full", "ign", "abs", "img")
_ = None  # the library cannot ignore pixels

# (library and its options, our loss and options, their value per case as a function of our value
# and the fraction of valid pixels, values). Made with torch 2.13.0, segmentation_models.pytorch
# 0.6.0 (smp), MONAI 1.6.1, nnU-Net 2 and optax 0.2.8.
GOLDEN = [
    ("torch CE", "cross_entropy", {}, _, (1.9114904, 2.1193588, 2.0118442, 1.9145066)),
    (
        "torch CE weight=[1,2,4]",
        "cross_entropy",
        {"class_weights": (1, 2, 4)},
        _,
        (1.8093631, 1.9417326, 1.9947337, 1.7952676),
    ),
    (
        "torch CE label_smoothing=.1",
        "cross_entropy",
        {"label_smoothing": 0.1},
        _,
        (1.9117573, 2.0984087, 2.0020757, 1.9144719),
    ),
    (
        "MMSegmentation CE, a mean over ignored pixels too",
        "cross_entropy",
        {},
        lambda ours, valid: ours * valid,
        (1.9114907, 1.7484710, 2.0118442, 1.9145066),
    ),
    (
        "smp SoftCE smooth=.1, a mean over ignored pixels too",
        "cross_entropy",
        {"label_smoothing": 0.1},
        lambda ours, valid: ours * valid,
        (1.9117576, 1.7311871, 2.0020757, 1.9144719),
    ),
    (
        "smp Dice",
        "soft_dice",
        {"absent": "zero"},
        _,
        (0.7146928, 0.7695948, 0.4276408, 0.7149505),
    ),
    (
        "smp Dice smooth=1, added to half of our fraction",
        "soft_dice",
        {"absent": "zero", "smooth": 2},
        _,
        (0.6639850, 0.7051075, 0.4025711, 0.6637141),
    ),
    (
        "smp Jaccard",
        "soft_jaccard",
        {"absent": "zero"},
        _,
        (0.8328838, 0.8694603, 0.5208106, 0.8330722),
    ),
    (
        "smp Tversky .3/.7",
        "tversky",
        {"absent": "zero", "alpha": 0.3, "beta": 0.7},
        _,
        (0.7138519, 0.7674763, 0.4466797, 0.7127355),
    ),
    ("smp Lovász", "lovasz_softmax", {}, _, (0.7880563, 0.8262241, 0.7554383, 0.7872767)),
    (
        "smp Lovász per_image",
        "lovasz_softmax",
        {"per": "image"},
        _,
        (0.7991380, 0.8266707, 0.7682287, 0.7857174),
    ),
    ("MONAI Dice", "soft_dice", MONAI, _, (0.7388864, 0.7730294, 0.7770156, 0.7689860)),
    (
        "MONAI Dice batch",
        "soft_dice",
        MONAI | {"per": "batch"},
        _,
        (0.7146925, _, 0.7609738, 0.7149503),
    ),
    (
        "MONAI Dice include_background=False",
        "soft_dice",
        MONAI | {"include_background": False},
        _,
        (0.7347856, _, 0.8487418, 0.7861397),
    ),
    (
        "MONAI Dice squared_pred",
        "soft_dice",
        MONAI | {"squared": True},
        _,
        (0.6903474, _, 0.7442150, 0.7302008),
    ),
    (
        "MONAI Dice smooth=0",
        "soft_dice",
        MONAI | {"smooth": 0},
        _,
        (0.7388871, _, 0.7770166, 0.7689869),
    ),
    ("MONAI Dice jaccard", "soft_jaccard", MONAI, _, (0.8448277, _, 0.8632390, 0.8605688)),
    (
        "MONAI Dice weight=[1,2,4], not divided by their mean",
        "soft_dice",
        MONAI | {"class_weights": (1, 2, 4)},
        lambda ours, valid: ours * 7 / 3,
        (1.7434677, _, 2.0095093, 1.8078035),
    ),
    ("MONAI DiceCE", "dice_ce", MONAI, _, (2.6503768, _, 2.7888598, 2.6834927)),
    (
        "nnU-Net, without the constant 1",
        "soft_dice",
        NNUNET | {"per": "image"},
        lambda ours, valid: ours - 1,
        (-0.2652144, -0.2487426, -0.1512582, -0.2138603),
    ),
    (
        "nnU-Net batch_dice, without the constant 1",
        "soft_dice",
        NNUNET,
        lambda ours, valid: ours - 1,
        (-0.2789369, -0.2518596, -0.1652140, -0.2629474),
    ),
    (
        "optax Dice, mean of the images; its smooth=1 is added to half of our fraction",
        "soft_dice",
        {"per": "image", "absent": "one", "smooth": 2},
        _,
        (
            (0.6265986 + 0.6425734) / 2,
            _,
            (0.6506141 + 0.6532789) / 2,
            (0.6535704 + 0.6425734) / 2,
        ),
    ),
]


@pytest.mark.parametrize(
    ("name", "options", "convert", "expected"),
    [row[1:] for row in GOLDEN],
    ids=[row[0] for row in GOLDEN],
)
def test_other_libraries_agree(name, options, convert, expected):
    for case, value in zip(CASES, expected, strict=True):
        if value is not None:
            logits, labels = golden_input(case)
            ours = LOSSES[name](logits, labels, **options)
            assert ours.dtype == jnp.float32
            ours = convert(float(ours), np.mean(labels != IGNORE_LABEL)) if convert else ours
            assert ours == pytest.approx(value, abs=1e-5, rel=0), case


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


@every_variant
def test_without_a_valid_pixel_loss_and_gradient_are_zero(loss):
    logits, labels = golden_input("full")
    logits[0] = np.nan
    value, gradient = value_and_grad(loss, logits, np.full_like(labels, IGNORE_LABEL))
    assert value == 0 and not np.any(gradient)


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


@every_loss
def test_four_devices_equal_one(loss):
    """Twice the same batch, spread over the devices, against once the batch on one device."""
    logits, labels = golden_input("ign")
    value, gradient = value_and_grad(loss, logits, labels)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    twice = (jax.device_put(np.concatenate([x, x]), sharding) for x in (logits, labels))
    sharded, sharded_gradient = value_and_grad(loss, *twice)
    assert sharded == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(
        sharded_gradient[:2] + sharded_gradient[2:], gradient, rtol=1e-5, atol=1e-8
    )


@every_loss
def test_half_precision_sums_are_float32(loss):
    """More pixels than the largest float16, 65504."""
    logits, labels = golden_input("ign")
    logits = jnp.asarray(logits, jnp.float16)
    value, _ = value_and_grad(loss, logits.astype(jnp.float32), labels)
    many = jnp.tile(logits, (1, 60, 60, 1)), jnp.tile(labels, (1, 60, 60))
    tiled, gradient = jax.jit(jax.value_and_grad(loss))(*many)
    assert tiled.dtype == jnp.float32 and gradient.dtype == jnp.float16
    assert tiled == pytest.approx(value, rel=1e-5)  # does not depend on the size of the image
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("name", ["soft_dice", "soft_jaccard", "tversky", "lovasz_softmax"])
def test_perfect_prediction_costs_nothing_beside_ignored_pixels(name):
    """Ignored pixels must not be in the denominator."""
    _, labels = golden_input("ign")
    logits = np.where(labels[..., None] == np.arange(3), 1e4, -1e4)
    logits[labels == IGNORE_LABEL] = [1e4, 0, 0]
    for per in ("batch", "image"):
        assert LOSSES[name](logits, labels, per=per) == 0


def test_missing_a_rare_class_costs_its_share_of_the_classes():
    """Dice is averaged per class, not summed over the pixels of all classes together."""
    labels = np.zeros((1, 10, 10), np.int32)
    labels[0, 0, 0] = 1
    logits = np.broadcast_to([1e4, -1e4], (1, 10, 10, 2))
    assert LOSSES["soft_dice"](logits, labels) == pytest.approx((1 + 1 / 199) / 2, rel=1e-5)


def test_absent_class_policies():
    """Skipped, or a loss of 0 in the mean, or the formula: 1 for any false positive."""
    logits, labels = golden_input("abs")
    skip, zero, one = (
        float(LOSSES["soft_dice"](logits, labels, absent=absent))
        for absent in ("skip", "zero", "one")
    )
    assert zero == pytest.approx(skip * 2 / 3) and one == pytest.approx((skip * 2 + 1) / 3)
    assert LOSSES["soft_dice"](logits, labels, absent="one", smooth=1e9) < 1e-6


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
def test_half_precision_logits_give_a_float32_loss(dtype):
    logits, labels = golden_input("ign")
    value = LOSSES["soft_dice"](jnp.asarray(logits, dtype), labels)
    assert value.dtype == jnp.float32
    assert value == LOSSES["soft_dice"](jnp.asarray(logits, dtype).astype(jnp.float32), labels)


def test_pixel_weights_may_be_anything_where_ignored():
    logits, labels = golden_input("ign")
    weights = np.where(labels == IGNORE_LABEL, np.nan, 2.0)
    ours = LOSSES["cross_entropy"](logits, labels, pixel_weights=weights)
    assert ours == pytest.approx(2.1193588)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_integer_labels_of_any_width(dtype):
    logits, labels = golden_input("ign")
    assert LOSSES["cross_entropy"](logits, labels.astype(dtype)) == pytest.approx(2.1193588)


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_input_is_an_error_that_says_what_was_expected(name):
    logits, labels = golden_input("full")
    for wrong, message in [
        ((logits[0], labels), r"logits must be floats \[b, h, w, c\], not float32 \(4, 5, 3\)"),
        ((labels, labels), r"logits must be floats \[b, h, w, c\], not int32 \(2, 4, 5\)"),
        ((logits.transpose(0, 3, 1, 2), labels), r"integers \(2, 3, 4\).*not int32 \(2, 4, 5\)"),
        ((logits, labels[..., None]), r"integers \(2, 4, 5\).*not int32 \(2, 4, 5, 1\)"),
        ((logits, labels.astype(np.float32)), r"integers \(2, 4, 5\).*not float32"),
        ((np.zeros((1, 1, 1, 256)), np.zeros((1, 1, 1), int)), "256 classes.* at most 255"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(LOSSES[name], *wrong)
    with pytest.raises(ValueError, match=r"3 numbers, one per class, not \(2,\)"):
        LOSSES[name](logits, labels, class_weights=(1, 2))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("soft_dice", {"per": "x"}, "per must be one of batch, image, not 'x'"),
        ("lovasz_softmax", {"per": "x"}, "per must be one of batch, image, not 'x'"),
        ("soft_jaccard", {"absent": "x"}, "absent must be one of skip, zero, one, not 'x'"),
        ("cross_entropy", {"label_smoothing": 2}, "label_smoothing must be in .*, not 2"),
        ("cross_entropy", {"top_k_fraction": 0}, "top_k_fraction must be in .*, not 0"),
        ("cross_entropy", {"pixel_weights": np.ones(3)}, r"\(2, 4, 5\), not \(3,\)"),
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
    loss = with_border(loss, class_weights)
    result = loss(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), jnp.asarray(border))
    np.testing.assert_allclose(result, np.sum(weights * nll) / np.sum(weights), rtol=1e-5)
