"""Tests receptive fields against published and hand-computed sizes, and uneven upsampling."""

import numpy as np
import pytest

from dense_jax import models
from dense_jax.models.upsampling import UPSAMPLERS
from dense_jax.models.upsampling.measures import checkerboard_index, receptive_field
from experiments import base
from tests.models import measures


def make(**fields):
    config = base.get_config().model
    with config.ignore_type():
        config.update(fields)
    return models.build(config, num_classes=2)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 6])
def test_transposed_convolutions_are_uneven_unless_the_factor_divides_the_kernel(
    kernel_size, factor
):
    up = UPSAMPLERS["transposed_conv"](features=2, factor=factor, kernel_size=kernel_size)
    # Along one axis, phase r gets the taps r, r + factor, ... of the kernel.
    taps = [len(range(phase, kernel_size, factor)) for phase in range(factor)]
    covered = np.outer(taps, taps)
    index = checkerboard_index(up)
    np.testing.assert_allclose(index, covered.std() / covered.mean(), rtol=1e-6)
    assert (index == 0) == (kernel_size % factor == 0)


# The number of rows that a pixel depends on, at a factor of 2.
ROWS = {
    **dict.fromkeys(("nearest", "bed_of_nails", "max_unpool", "transposed_conv"), 1),
    "bilinear": 2,
    "bicubic": 4,
    "pixel_shuffle": 3,
    "resize_conv": 2,
    "carafe": 5,
    "dysample": 2,
}


@pytest.mark.parametrize("upsampling", ROWS)
def test_only_bed_of_nails_is_uneven_by_default(upsampling):
    index = checkerboard_index(UPSAMPLERS[upsampling](features=2))
    assert index == pytest.approx(np.sqrt(3) if upsampling == "bed_of_nails" else 0, abs=1e-6)


def test_a_fixed_bilinear_kernel_is_even():
    fixed = UPSAMPLERS["transposed_conv"](features=2, factor=4, init="bilinear", learn=False)
    assert checkerboard_index(fixed) == 0


@pytest.mark.parametrize(
    ("upsampling", "options", "index"),
    [
        # Four independent phases, of variance v: the deviation of the phases has the variance
        # 3 v / 4, and their mean has the variance v / 4.
        ("transposed_conv", {}, np.sqrt(3)),
        ("transposed_conv", {"init": "bilinear"}, 0),
        ("pixel_shuffle", {"init": "icnr"}, 0),
        ("carafe", {}, 0),
    ],
    ids=str,
)
def test_random_weights_start_uneven_unless_the_phases_share_them(upsampling, options, index):
    up = UPSAMPLERS[upsampling](features=256, **options)
    assert checkerboard_index(up, initial=True) == pytest.approx(index, rel=0.15, abs=1e-3)


@pytest.mark.parametrize("upsampling", ROWS)
def test_receptive_fields_of_upsampling_are_those_by_hand(upsampling):
    assert receptive_field(UPSAMPLERS[upsampling](features=2)) == ROWS[upsampling]


@pytest.mark.parametrize(("kernel_size", "rows"), [(3, 2), (4, 2), (5, 3)])
def test_larger_kernels_of_a_transposed_convolution_overlap(kernel_size, rows):
    up = UPSAMPLERS["transposed_conv"](features=2, kernel_size=kernel_size)
    assert receptive_field(up) == rows


def extent_of_unet(pixel, *, before, margin):
    """What a U-Net of two widths and single 3x3 convolutions sees along one axis, by hand.

    before: pixels of padding at each convolution; margin: of the image's.
    """

    def convolve(low, high):
        return low - before, high - before + 2

    low, high = convolve(pixel, pixel)
    low, high = convolve(low // 2, high // 2)
    low, high = convolve(2 * low, 2 * high + 1)
    return slice(low - margin, high - margin + 1)


@pytest.mark.parametrize(
    ("fields", "before", "margin"),
    [
        ({}, 1, 0),
        ({"freeze_encoder": True}, 1, 0),
        ({"padding": "VALID"}, 0, 4),
    ],
    ids=str,
)
def test_receptive_field_of_a_unet_equals_the_one_by_hand(fields, before, margin):
    model = make(widths=(2, 3), convs_per_level=1, upsampling="nearest", **fields)
    model = model.clone(has_context=True)  # whose logits are fewer than the pixels
    rows, columns = measures.receptive_field(model, (24, 26), channels=1)
    assert rows == extent_of_unet(12, before=before, margin=margin)
    assert columns == extent_of_unet(13, before=before, margin=margin)


@pytest.mark.parametrize(("encoder", "published"), [("vgg16", 404), ("alexnet", 355)])
def test_fcn32s_has_the_published_receptive_field_around_its_cell(encoder, published):
    """arXiv 1411.4038, table 1; and no crop or padding has moved the output off the input."""
    model = make(
        name="fcn",
        encoder=encoder,
        norm="none",
        upsampling="nearest",
        skips=(),
        width_multiplier=1e-6,  # a single channel
    )
    for field in measures.receptive_field(model, (416, 416), channels=1):
        assert field.stop - field.start == published
        cell = 208 // 32 * 32  # first pixel of the one that has the center pixel
        assert abs((field.start + field.stop) / 2 - (cell + 16)) <= 1


@pytest.mark.parametrize(("size", "fields"), [((10, 26), {}), ((24, 26), {"norm": "group"})])
def test_a_truncated_receptive_field_is_an_error(size, fields):
    model = make(widths=(2, 3), convs_per_level=1, upsampling="nearest", **fields)
    with pytest.raises(ValueError, match="use a larger one"):
        measures.receptive_field(model, size, channels=1)
