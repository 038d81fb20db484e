"""Tests upsampling methods, and the max-pool that max-unpooling inverts, against references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dense_jax.models.layers import max_pool, max_unpool, pixel_shuffle
from dense_jax.models.upsampling import UPSAMPLERS
from dense_jax.models.upsampling.convolutions import transposed_conv
from dense_jax.models.upsampling.dysample import sample
from dense_jax.models.upsampling.fixed import bicubic, interpolate, linear_weight

LOCAL = ["nearest", "bilinear", "bicubic", "bed_of_nails", "max_unpool"]  # no channel is mixed


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def apply(name, x, switches=None, **options):
    up = UPSAMPLERS[name](**options)
    return jax.jit(up.init_with_output)(jax.random.key(1), x, switches)


def apply_random(name, x, **options):
    """The output and the intermediate outputs, with weights far from their initial values."""
    up, rng = UPSAMPLERS[name](**options), np.random.default_rng(0)
    variables = jax.tree.map(
        lambda shape: rng.normal(size=shape.shape).astype(np.float32),
        jax.eval_shape(up.init, jax.random.key(0), x),
    )
    y, state = jax.jit(functools.partial(up.apply, capture_intermediates=True))(variables, x)
    return y, state["intermediates"]


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


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear", "bicubic"])
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
    np.testing.assert_allclose(interpolate(x, factor, 1, linear_weight), expected, atol=1e-6)


@pytest.mark.parametrize(("size", "factor"), [((1, 2), 2), ((5, 3), 3), ((4, 6), 4)])
def test_bicubic_is_cubic_convolution_with_half_pixel_centers_and_clamped_edges(size, factor):
    """Keys 1981, equation 4, with PyTorch's a = -0.75 instead of -0.5."""
    x = np.asarray(random(*size), np.float64)
    expected = np.zeros((factor * size[0], factor * size[1]))
    for i, j in np.ndindex(expected.shape):
        row, column = ((n + 0.5) / factor - 0.5 for n in (i, j))
        for u, v in np.ndindex(4, 4):
            y, z = int(np.floor(row)) - 1 + u, int(np.floor(column)) - 1 + v
            weight = keys_kernel(row - y, -0.75) * keys_kernel(column - z, -0.75)
            expected[i, j] += weight * x[np.clip(y, 0, size[0] - 1), np.clip(z, 0, size[1] - 1)]
    enlarge = jax.jit(bicubic, static_argnums=1)
    y = enlarge(jnp.asarray(x, jnp.float32)[None, ..., None], factor)
    np.testing.assert_allclose(y[0, ..., 0], expected, atol=1e-5)


def keys_kernel(s, a):
    near, far = (
        np.polyval([a + 2, -(a + 3), 0, 1], abs(s)),
        np.polyval([a, -5 * a, 8 * a, -4 * a], abs(s)),
    )
    return near if abs(s) <= 1 else far if abs(s) < 2 else 0.0


@pytest.mark.parametrize("factor", [2, 3, 8, 32])
def test_interpolations_equal_torch(functional, factor):
    x = random(2, 5, 3, 2)
    centers = {"align_corners": False}
    for name, options in (("bilinear", centers), ("bicubic", centers), ("nearest", {})):
        y, _ = apply(name, x, features=2, factor=factor)
        expected = functional.interpolate(to_torch(x), scale_factor=factor, mode=name, **options)
        np.testing.assert_allclose(y, from_torch(expected), atol=1e-5)


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear", "bicubic", "carafe", "dysample"])
def test_interpolation_keeps_constants(upsampling):
    border = 4 if upsampling == "carafe" else 0  # it reads zeros beyond the border
    y, _ = apply_random(upsampling, jnp.ones((1, 7, 6, 4)), features=4)
    np.testing.assert_allclose(y[:, border : 14 - border, border : 12 - border], 1, rtol=1e-6)


@pytest.mark.parametrize("upsampling", sorted(UPSAMPLERS.keys() - {"max_unpool"}))
def test_moving_the_input_by_a_pixel_moves_the_output_by_a_cell(upsampling):
    """Away from the border."""
    x = random(13, 12, 4)
    maps = jnp.stack([x, jnp.roll(x, (1, 2), (0, 1))])
    (y, moved), _ = apply_random(upsampling, maps, features=4, factor=3)
    inner = slice(15, 24)
    expected = np.roll(y, (3, 6), (0, 1))[inner, inner]
    np.testing.assert_allclose(moved[inner, inner], expected, rtol=1e-4, atol=1e-4)


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


class TestCARAFE:
    @pytest.mark.parametrize("factor", [2, 3])
    def test_is_a_weighted_sum_of_the_5x5_pixels_around_the_cell(self, factor):
        """Equations 2 and 4 of arXiv 1905.02188; pixels beyond the border are 0."""
        x = random(1, 4, 3, 3)
        y, intermediates = apply_random("carafe", x, features=3, factor=factor)
        kernels = np.asarray(intermediates["encode"]["__call__"][0][0], np.float64)
        padded = np.pad(x[0], ((2, 2), (2, 2), (0, 0)))
        expected = np.zeros((4 * factor, 3 * factor, 3))
        for i, j in np.ndindex(expected.shape[:2]):
            phase = i % factor * factor + j % factor
            kernel = np.exp(kernels[i // factor, j // factor, 25 * phase : 25 * (phase + 1)])
            around = padded[i // factor : i // factor + 5, j // factor : j // factor + 5]
            expected[i, j] = np.tensordot(kernel.reshape(5, 5) / kernel.sum(), around, 2)
        np.testing.assert_allclose(y[0], expected, rtol=1e-4, atol=1e-5)

    def test_its_kernels_depend_on_3x3_pixels_through_64_channels_and_start_uniform(self):
        x = random(1, 9, 9, 8)
        y, variables = apply("carafe", x, features=8)
        shapes = {name: p["kernel"].shape for name, p in variables["params"].items()}
        assert shapes == {"compress": (1, 1, 8, 64), "encode": (3, 3, 64, 4 * 25)}
        averages = np.mean([x[0, i : 5 + i, j : 5 + j] for i, j in np.ndindex(5, 5)], axis=0)
        expected = averages.repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_allclose(y[0, 4:-4, 4:-4], expected, atol=0.02)


class TestDySample:
    @pytest.mark.parametrize(("factor", "features"), [(2, 8), (3, 6)])
    def test_reads_at_its_own_position_plus_an_offset(self, factor, features):
        """Section 3 of arXiv 2308.15085, with the static scope factor 0.25."""
        x, groups = random(1, 4, 5, features), 4 if features == 8 else 2
        y, intermediates = apply_random("dysample", x, features=features, factor=factor)
        offsets = np.asarray(intermediates["offset"]["__call__"][0][0], np.float64)
        offsets = 0.25 * offsets.reshape(4, 5, factor, factor, groups, 2)
        image = np.asarray(x[0]).reshape(4, 5, groups, -1)
        expected = np.zeros((4 * factor, 5 * factor, groups, features // groups))
        for i, j, g in np.ndindex(expected.shape[:3]):
            down, right = offsets[i // factor, j // factor, i % factor, j % factor, g]
            row, column = (i + 0.5) / factor - 0.5 + down, (j + 0.5) / factor - 0.5 + right
            expected[i, j, g] = read(image[:, :, g], row, column)
        np.testing.assert_allclose(y[0], expected.reshape(*y.shape[1:]), rtol=1e-4, atol=1e-4)

    def test_starts_as_bilinear(self):
        x = random(1, 5, 4, 8)
        y, variables = apply("dysample", x, features=8, factor=3)
        assert variables["params"]["offset"]["kernel"].shape == (1, 1, 8, 2 * 4 * 3**2)
        expected, _ = apply("bilinear", x, features=8, factor=3)
        np.testing.assert_allclose(y, expected, atol=0.01)

    def test_positions_have_gradients_in_and_beyond_the_map(self):
        x = jnp.arange(12.0).reshape(1, 3, 4, 1)
        at = lambda row, column: (jnp.full((1, 1, 1, 1), row), jnp.full((1, 1, 1, 1), column))
        slope = jax.jit(jax.grad(lambda row, column: sample(x, *at(row, column)).sum(), (0, 1)))
        np.testing.assert_allclose(slope(0.3, 1.6), (4, 1), rtol=1e-5)
        np.testing.assert_allclose(slope(-0.5, 7.0), (0, 0))


def read(image, row, column):
    """The bilinear value at a position, which is moved into the image first."""
    row, column = np.clip(row, 0, len(image) - 1), np.clip(column, 0, image.shape[1] - 1)
    total = 0
    for i, j in np.ndindex(image.shape[:2]):
        total = total + max(0, 1 - abs(row - i)) * max(0, 1 - abs(column - j)) * image[i, j]
    return total


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
