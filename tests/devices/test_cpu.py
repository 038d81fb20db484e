"""The convolution of all layers is XLA's own in value and gradients, and elsewhere also in form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dense_jax.devices.cpu import IS_THREADED, Conv, convolution
from dense_jax.models.layers import BatchNorm

LAYERS = {  # channels in and out, kernel size, strides, padding
    "3x3 of an image": (3, 16, 3, 1, "SAME"),
    "few from many": (20, 4, 3, 1, "SAME"),
    "few from many, unpadded": (20, 4, 3, 1, "VALID"),
    "uneven padding": (20, 4, 3, 1, ((0, 2), (2, 1))),
    "few, uneven padding": (4, 5, 3, 1, ((0, 2), (2, 1))),
    "even kernel": (20, 4, 4, 1, ((1, 2), (2, 1))),
    "7x7": (4, 4, 7, 1, 3),
    "1x1": (4, 6, 1, 1, "SAME"),
    "1x1, padded": (4, 6, 1, 1, 1),
    "1x1 with stride": (4, 6, 1, 2, "SAME"),
    "stride": (3, 4, 3, 2, 1),
    "many": (18, 20, 3, 1, "SAME"),
    "deep": (160, 120, 3, 1, "SAME"),
    "deep, uneven padding": (160, 120, 3, 1, ((0, 2), (1, 0))),
}


def plain(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def layer(channels, features, size, stride, padding, dtype="float64"):
    """Image and kernel, and what a convolution takes beside them."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, 7, channels)), dtype)
    kernel = rng.normal(0, (size * size * channels) ** -0.5, (size, size, channels, features))
    if isinstance(padding, int):
        padding = ((padding, padding),) * 2
    return (x, jnp.asarray(kernel, dtype)), ((stride, stride), padding)


def with_gradients(convolve, options):
    """The sum of a curved function of the result, with its gradients."""
    return jax.value_and_grad(
        lambda x, kernel: jnp.sin(convolve(x, kernel, *options)).sum(), (0, 1)
    )


@pytest.mark.parametrize("case", LAYERS)
def test_values_and_gradients_are_those_of_xlas_own(case):
    with jax.enable_x64(True):
        arrays, options = layer(*LAYERS[case])
        found = jax.jit(with_gradients(convolution, options))(*arrays)
        expected = jax.jit(with_gradients(plain, options))(*arrays)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_dilation": 2},
        {"input_dilation": (1, 2), "padding": 1},
        {"precision": "highest"},
        {"feature_group_count": 2},
        {"strides": (1, 2)},
        {"kernel_size": (3,)},
        {"kernel_size": (3, 3, 3)},
        {"kernel_size": (1, 1), "kernel_dilation": 2, "precision": "highest"},
        {"padding": ((6, 3), (0, 1))},  # further than the kernel reaches
        {"padding": ((0, 1), (3, 0)), "features": 2},
        {"padding": ((-1, 0), (1, 1))},
        {"kernel_size": (1, 1), "padding": ((0, 0), (0, 1))},
    ],
    ids=str,
)
def test_an_option_that_is_not_written_otherwise_is_xlas_own(options):
    """The very program, gradients included."""
    options = {"features": 6, "kernel_size": (3, 3)} | options
    x = jax.ShapeDtypeStruct((2, *(9, 7, 5)[: len(options["kernel_size"])], 4), "float32")

    def program(layer):
        def loss(variables, x):
            return jnp.sin(layer(**options).apply(variables, x)).sum()

        variables = jax.eval_shape(nn.Conv(**options).init, jax.random.key(0), x)
        return str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(variables, x))

    assert program(Conv) == program(nn.Conv)


@pytest.mark.parametrize("options", [{"batch_group_count": 2}, {"an_option_of_later": 1}])
def test_every_option_reaches_xla(options, monkeypatch):
    found = []
    x = jnp.zeros((1, 4, 4, 1))
    monkeypatch.setattr(jax.lax, "conv_general_dilated", lambda *_, **o: found.append(o) or x)
    convolution(x, jnp.zeros((3, 3, 1, 1)), (1, 1), "SAME", **options)
    assert found[0].items() >= options.items()


@pytest.mark.parametrize("case", ["few from many", "3x3 of an image", "1x1", "deep"])
def test_transformations_go_through(case):
    """Of single images: mapped, computed again for the gradient, and in bfloat16."""
    arrays, options = layer(*LAYERS[case], dtype="float32")
    images, kernel = arrays[0][:, None], arrays[1]
    expected = [with_gradients(plain, options)(image, kernel) for image in images]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    for each in (convolution, jax.checkpoint(convolution, static_argnums=(2, 3))):
        mapped = jax.vmap(with_gradients(each, options), in_axes=(0, None))
        for a, b in zip(*map(jax.tree.leaves, (mapped(images, kernel), expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
    shapes = jax.eval_shape(with_gradients(convolution, options), *half)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes[1]) == tuple(
        (x.shape, x.dtype) for x in half
    )


@pytest.mark.parametrize("case", ["few from many", "3x3 of an image", "many", "deep"])
def test_other_platforms_get_xlas_own(case):
    """Lowered for a CPU and a TPU alike, without having either."""
    arrays, options = layer(*LAYERS[case], dtype="float32")

    def operations(convolve, platform):
        traced = jax.jit(with_gradients(convolve, options)).trace(*arrays)
        lines = traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
        return sorted(
            line.split(" = ")[1].split("(%")[0] + line.split("window")[1]
            for line in lines
            if "stablehlo.convolution" in line
        )

    assert operations(convolution, "tpu") == operations(plain, "tpu")
    assert operations(convolution, "cpu") != operations(plain, "cpu")
    exported = jax.export.export(
        jax.jit(with_gradients(convolution, options)), platforms=("cpu", "cuda", "tpu")
    )(*arrays)
    assert exported.platforms == ("cpu", "cuda", "tpu")


def test_a_cpu_gets_the_library_that_uses_its_cores():
    """YNNPACK, where it does: not in jaxlib 0.10."""
    arrays, options = layer(*LAYERS["many"], dtype="float32")
    lowered = jax.jit(convolution, static_argnums=(2, 3)).lower(*arrays, *options)
    assert ("ynn" in lowered.compile().as_text()) == IS_THREADED


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_is_flaxs(train, dtype):
    """Its result, gradients, variables and running averages."""
    options = {"momentum": 0.9, "epsilon": 1e-5, "dtype": jnp.dtype(dtype)}
    theirs, ours = nn.BatchNorm(not train, **options), BatchNorm(train, **options)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(0.5, 2, (3, 5, 4, 6)), dtype)
    fresh = theirs.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), x), fresh)
    variables = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 2, v.shape), v.dtype), fresh)

    def outcome(norm):
        def loss(params, x):
            y, new = norm.apply(variables | {"params": params}, x, mutable=["batch_stats"])
            return jnp.sin(y.astype(jnp.float32)).sum(), (y, new)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)

    found, expected = outcome(ours), outcome(theirs)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    tolerance = 1e-4 if dtype == "float32" else 0.1
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(value, np.float64) for value in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mean", [0.0, 1000.0, -3000.0])
def test_batch_norm_is_exact_far_from_zero(mean):
    """In float32, next to flax's in float64: result, gradient and running variance."""
    rng = np.random.default_rng(0)
    x = rng.normal(mean, 1, (4, 8, 6, 3)).astype(np.float32)
    x[0, 0, 0] += 20  # a corner that is like nothing else
    weights = rng.normal(size=x.shape).astype(np.float32)

    def outcome(norm, x):
        def loss(x):
            y, new = norm.apply(norm.init(jax.random.key(0), x), x, mutable=["batch_stats"])
            return (weights * y).sum(), (y, new["batch_stats"]["var"])

        gradient, (y, var) = jax.grad(loss, has_aux=True)(x)
        return y, gradient, var

    options = {"momentum": 0.9, "epsilon": 1e-5}
    found = outcome(BatchNorm(True, **options), jnp.asarray(x))
    with jax.enable_x64(True):
        theirs = nn.BatchNorm(False, use_fast_variance=False, **options)
        expected = outcome(theirs, jnp.asarray(x, "float64"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
