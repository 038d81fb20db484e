"""Tests upsampling methods, and the max-pool that max-unpooling inverts, against references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dense_jax.models.layers import max_pool, max_unpool, pixel_shuffle
from dense_jax.models.upsampling import UPSAMPLERS, interpolate, transposed_conv

LOCAL = ["nearest", "bilinear", "bed_of_nails", "max_unpool"]  # no channel is mixed


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def apply(name, x, switches=None, **options):
    up = UPSAMPLERS[name](**options)
    return up.init_with_output(jax.random.key(1), x, switches)


def to_torch(x):
    import torch

    return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())


def from_torch(x):
    return x.numpy().transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def functional():
    pytest.importorskip("torch", reason="compares with PyTorch where it is installed")
    import torch.nn.functional

    return torch.nn.functional


class TestMaxPool:
    def test_equals_flax_and_switches_point_at_the_maximum(self):
        x = random(2, 6, 4, 3)
        pooled, switches = max_pool(x)
        np.testing.assert_array_equal(pooled, nn.max_pool(x, (2, 2), (2, 2)))
        b, i, j, c = np.indices(pooled.shape)
        row, column = np.divmod(np.asarray(switches), 2)
        np.testing.assert_array_equal(np.asarray(x)[b, 2 * i + row, 2 * j + column, c], pooled)

    def test_of_equal_pixels_the_first_wins(self):
        _, switches = max_pool(jnp.zeros((1, 2, 2, 1)))
        assert switches.item() == 0

    @pytest.mark.parametrize("size", [(2, 2), (10, 6), (14, 70)])
    def test_switches_are_torchs_indices(self, functional, size):
        # Few values, so that there are ties.
        x = jnp.round(random(2, *size, 3))
        pooled, switches = max_pool(x)
        expected, indices = functional.max_pool2d(to_torch(x), 2, return_indices=True)
        np.testing.assert_array_equal(pooled, from_torch(expected))
        _, i, j, _ = np.indices(pooled.shape)
        row, column = np.divmod(np.asarray(switches), 2)
        np.testing.assert_array_equal((2 * i + row) * size[1] + 2 * j + column, from_torch(indices))


class TestMaxUnpool:
    @pytest.mark.parametrize("size", [(2, 2), (10, 6), (14, 70)])
    def test_equals_torch(self, functional, size):
        x = random(2, *size, 3)
        _, switches = max_pool(x)
        _, indices = functional.max_pool2d(to_torch(x), 2, return_indices=True)
        y = random(*switches.shape, seed=1)
        expected = functional.max_unpool2d(to_torch(y), indices, 2)
        np.testing.assert_array_equal(max_unpool(y, switches), from_torch(expected))

    @pytest.mark.parametrize("size", [(2, 2), (6, 10), (14, 70)])  # pooled: odd heights and widths
    def test_pooling_what_was_unpooled_gives_it_back(self, size):
        x = abs(random(1, *size, 2)) + 1
        pooled, switches = max_pool(x)
        unpooled = max_unpool(pooled, switches)
        again, same_switches = max_pool(unpooled)
        np.testing.assert_array_equal(again, pooled)
        np.testing.assert_array_equal(same_switches, switches)
        # Every maximum is where it was, and three of four pixels are 0.
        np.testing.assert_array_equal(unpooled, jnp.where(unpooled != 0, x, 0))
        assert np.count_nonzero(unpooled) == pooled.size

    def test_channels_are_those_of_the_switches_in_between(self):
        _, switches = max_pool(random(1, 4, 6, 5))
        y, variables = apply("max_unpool", random(1, 2, 3, 4), switches, features=3)
        assert y.shape == (1, 4, 6, 3)
        kernels = {name: p["conv"]["kernel"].shape for name, p in variables["params"].items()}
        assert kernels == {"project": (1, 1, 4, 5), "widen": (1, 1, 5, 3)}
        _, variables = apply("max_unpool", random(1, 2, 3, 5), switches, features=5)
        assert not jax.tree.leaves(variables)  # as in SegNet

    def test_without_switches_it_says_what_to_use(self):
        with pytest.raises(ValueError, match="use bed_of_nails or transposed_conv"):
            apply("max_unpool", random(1, 2, 3, 4), features=4)


@pytest.mark.parametrize("features", [5, 6])
@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("upsampling", UPSAMPLERS)
def test_upsamplers_enlarge_by_their_factor(upsampling, factor, features):
    if upsampling == "max_unpool" and factor != 2:
        pytest.skip("max-pools halve")
    switches = jnp.zeros((2, 3, 4, 6), jnp.int32)

    def enlarge(x):
        up = UPSAMPLERS[upsampling](features=features, factor=factor)
        return up.init_with_output(jax.random.key(0), x, switches)[0]

    y = jax.eval_shape(enlarge, jax.ShapeDtypeStruct((2, 3, 4, 6), jnp.float32))
    assert y.shape == (2, 3 * factor, 4 * factor, features)


@pytest.mark.parametrize("upsampling", LOCAL)
def test_projections_run_at_the_lower_resolution_and_only_where_channels_change(upsampling):
    switches = jnp.zeros((1, 3, 4, 6), jnp.int32) if upsampling == "max_unpool" else None
    up = UPSAMPLERS[upsampling](features=6)
    assert not jax.tree.leaves(up.init(jax.random.key(0), random(1, 3, 4, 6), switches))
    x = random(1, 3, 4, 8)
    variables = up.init(jax.random.key(0), x, switches)
    assert set(variables["params"]) == {"project"}
    _, state = up.apply(variables, x, switches, capture_intermediates=True)
    projected = state["intermediates"]["project"]["conv"]["__call__"][0]
    assert projected.shape == (1, 3, 4, 6)


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
def test_projecting_before_enlarging_is_the_same_function_as_after(upsampling):
    x = random(1, 3, 4, 5)
    y, variables = apply(upsampling, x, features=2)
    enlarged, _ = apply(upsampling, x, features=5)
    conv = variables["params"]["project"]["conv"]
    expected = enlarged @ conv["kernel"][0, 0] + conv["bias"][None, None, None]
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("factor", [2, 3, 8])
def test_bilinear_has_half_pixel_centers(size, factor):
    x = random(1, size, 3, 2)
    expected = jax.image.resize(x, (1, factor * size, 3, 2), "bilinear")
    np.testing.assert_allclose(interpolate(x, factor, axis=1), expected, atol=1e-6)


@pytest.mark.parametrize("factor", [2, 3, 8, 32])
def test_bilinear_and_nearest_equal_torch(functional, factor):
    x = random(2, 5, 3, 2)
    for name, options in (("bilinear", {"align_corners": False}), ("nearest", {})):
        y, _ = apply(name, x, features=2, factor=factor)
        expected = functional.interpolate(to_torch(x), scale_factor=factor, mode=name, **options)
        np.testing.assert_allclose(y, from_torch(expected), atol=1e-5)


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
def test_interpolation_keeps_constants(upsampling):
    y, _ = apply(upsampling, jnp.ones((1, 3, 3, 4)), features=1)
    np.testing.assert_allclose(y, np.broadcast_to(y[0, 0, 0, 0], y.shape), rtol=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
def test_bed_of_nails_is_0_but_for_one_pixel_per_cell(factor):
    x = random(1, 3, 4, 2)
    y, _ = apply("bed_of_nails", x, features=2, factor=factor)
    np.testing.assert_array_equal(y[:, ::factor, ::factor], x)
    assert np.count_nonzero(y) == x.size


def test_pixel_shuffle_spreads_channels_over_the_cell():
    x = random(2, 3, 4, 2 * 2 * 5)
    y = pixel_shuffle(x, 2)
    for row, column in np.ndindex(2, 2):
        phase = 2 * row + column
        np.testing.assert_array_equal(y[:, row::2, column::2], x[..., 5 * phase : 5 * (phase + 1)])


def test_pixel_shuffle_equals_torch(functional):
    x = random(2, 3, 4, 9 * 5)
    # There, the channels are ordered (c, row, column).
    theirs = to_torch(x.reshape(2, 3, 4, 9, 5).swapaxes(3, 4).reshape(x.shape))
    expected = from_torch(functional.pixel_shuffle(theirs, 3))
    np.testing.assert_array_equal(pixel_shuffle(x, 3), expected)


def test_icnr_starts_without_a_checkerboard():
    x = random(1, 5, 5, 3)
    y, _ = apply("pixel_shuffle", x, features=2, factor=3, init="icnr")
    nearest = jnp.repeat(jnp.repeat(y[:, ::3, ::3], 3, axis=1), 3, axis=2)
    np.testing.assert_allclose(y, nearest, atol=1e-6)
    y, _ = apply("pixel_shuffle", x, features=2, factor=3)
    assert abs(y[:, ::3] - y[:, 1::3]).max() > 0.1


def test_resize_conv_is_nearest_and_a_3x3_convolution():
    x = random(1, 3, 4, 2)
    y, variables = apply("resize_conv", x, features=5)
    kernel = variables["params"]["conv"]["kernel"]
    assert kernel.shape == (3, 3, 2, 5)
    enlarged = jnp.pad(
        jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), ((0, 0), (1, 1), (1, 1), (0, 0))
    )
    expected = sum(enlarged[:, u : u + 6, v : v + 8] @ kernel[u, v] for u, v in np.ndindex(3, 3))
    np.testing.assert_allclose(y, expected, atol=1e-5)


class TestTransposedConv:
    @pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 8])
    @pytest.mark.parametrize("factor", [2, 3, 4])
    def test_scatters_each_pixel_through_its_kernel(self, kernel, factor):
        """The definition: each input pixel adds its value times the kernel around its cell."""
        x, weight = random(1, 3, 4, 2), random(kernel, kernel, 2, 3, seed=1)
        first = -((kernel - factor + 1) // 2)  # torch's `padding` is cut off at the start
        expected = np.zeros((3 * factor, 4 * factor, 3))
        for i, j, u, v in np.ndindex(3, 4, kernel, kernel):
            row, column = i * factor + u + first, j * factor + v + first
            if 0 <= row < expected.shape[0] and 0 <= column < expected.shape[1]:
                expected[row, column] += np.asarray(x[0, i, j]) @ np.asarray(weight[u, v])
        np.testing.assert_allclose(transposed_conv(x, weight, factor)[0], expected, atol=1e-5)

    @pytest.mark.parametrize(
        ("kernel", "factor"), [(2, 2), (3, 2), (4, 2), (3, 3), (16, 8), (64, 32)]
    )
    def test_equals_torch(self, functional, kernel, factor):
        x, weight = random(2, 5, 3, 4), random(kernel, kernel, 4, 3, seed=1)
        padding = (kernel - factor + 1) // 2
        expected = functional.conv_transpose2d(
            to_torch(x),
            to_torch(weight.transpose(2, 0, 1, 3)),  # [in, out, k, k]
            stride=factor,
            padding=padding,
            output_padding=factor - kernel + 2 * padding,
        )
        y = transposed_conv(x, weight, factor)
        np.testing.assert_allclose(y, from_torch(expected), atol=1e-4)

    def test_the_default_kernel_is_the_factor(self):
        for factor in (2, 4):
            _, variables = apply("transposed_conv", random(1, 3, 4, 2), features=3, factor=factor)
            assert variables["params"]["kernel"].shape == (factor, factor, 2, 3)

    @pytest.mark.parametrize("kernel", [2, 3, 4])
    def test_starts_with_unit_gain(self, kernel):
        x = random(1, 24, 24, 64)
        y, _ = apply("transposed_conv", x, features=64, kernel_size=kernel)
        np.testing.assert_allclose(y[:, 4:-4, 4:-4].std(), 1, atol=0.1)

    @pytest.mark.parametrize("factor", [2, 3, 8, 32])
    def test_bilinear_is_the_interpolation_away_from_the_border(self, factor):
        """FCN's kernels are 4/2, 16/8 and 64/32 (arXiv 1411.4038, section 3.3)."""
        x = random(1, 5, 6, 3)
        options = {"features": 3, "factor": factor, "init": "bilinear"}
        y, variables = apply("transposed_conv", x, **options)
        size = 2 * factor - factor % 2
        assert variables["params"]["kernel"].shape == (size, size, 3, 3)
        expected, _ = apply("bilinear", x, features=3, factor=factor)
        inner = slice(factor, -factor)
        np.testing.assert_allclose(y[:, inner, inner], expected[:, inner, inner], atol=1e-5)
        fixed, variables = apply("transposed_conv", x, **options, learn=False)
        np.testing.assert_allclose(fixed, y, atol=1e-6)
        assert not jax.tree.leaves(variables)

    @pytest.mark.parametrize("kernel", [3, 4, 5, 8])
    def test_bilinear_of_any_size_keeps_a_constant_on_average(self, kernel):
        x = jnp.ones((1, 9, 9, 2))
        options = {"features": 2, "init": "bilinear", "kernel_size": kernel}
        y, _ = apply("transposed_conv", x, **options)
        np.testing.assert_allclose(y[:, 6:12, 6:12].mean(), 1, rtol=1e-5)

    def test_bilinear_of_other_channels_is_projected_first(self):
        x = random(1, 3, 4, 5)
        y, variables = apply("transposed_conv", x, features=2, init="bilinear", learn=False)
        assert y.shape == (1, 6, 8, 2)
        assert variables["params"]["project"]["conv"]["kernel"].shape == (1, 1, 5, 2)
