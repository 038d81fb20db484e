"""Tests that fast layers equal Flax layers in value and all derivatives, or fall back to Flax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dense_jax import models
from dense_jax.devices import cpu
from dense_jax.devices.cpu import IS_THREADED, convolution
from experiments import base

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
    "deep, widening": (120, 160, 3, 1, "SAME"),
}


def plain(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def layer(channels, features, size, stride, padding, dtype="float64"):
    """An image and a kernel, and the strides and padding of a convolution."""
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
        fast = jax.jit(with_gradients(convolution, options))(*arrays)
        expected = jax.jit(with_gradients(plain, options))(*arrays)
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "size, strides, dilation, padding",
    [
        (3, (1, 1), (1, 1), "SAME"),
        (5, (2, 2), (1, 1), ((2, 2), (2, 2))),
        (3, (2, 1), (1, 1), ((0, 2), (1, 0))),
        (3, (1, 1), (3, 2), "SAME"),
        (2, (3, 2), (2, 1), "VALID"),
        (1, (2, 2), (1, 1), "SAME"),
    ],
)
def test_depthwise_values_and_gradients_are_those_of_xlas_own(size, strides, dilation, padding):
    rng = np.random.default_rng(0)
    options = {"rhs_dilation": dilation, "feature_group_count": 5}
    options |= {"dimension_numbers": cpu.NEUTRAL["dimension_numbers"]}
    with jax.enable_x64(True):
        arrays = [jnp.asarray(rng.normal(size=s)) for s in ((2, 9, 7, 5), (size, size, 1, 5))]
        fast, expected = (
            jax.jit(with_gradients(functools.partial(convolve, **options), (strides, padding)))
            for convolve in (convolution, jax.lax.conv_general_dilated)
        )
        is_on_cpu = jax.default_backend() == "cpu"
        assert ("convolution" in fast.lower(*arrays).as_text()) != is_on_cpu
        for a, b in zip(*(jax.tree.leaves(f(*arrays)) for f in (fast, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_a_fully_connected_kernel_is_a_matrix_product(monkeypatch):
    monkeypatch.setattr(cpu, "DENSE_WEIGHTS", 1)
    with jax.enable_x64(True):
        arrays, options = layer(4, 6, 6, 1, ((3, 2), (3, 2)))
        assert " conv[" not in str(jax.make_jaxpr(lambda *a: convolution(*a, *options))(*arrays))
        fast = jax.jit(with_gradients(convolution, options))(*arrays)
        expected = jax.jit(with_gradients(plain, options))(*arrays)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), fast, expected
    )


def derivatives(convolve, x, kernel):
    """What the transformations of JAX make of a convolution of images [n, h, w, c]."""

    def loss(x, kernel):
        return jnp.sin(convolve(x, kernel)).sum()

    gradient, arrays = jax.grad(loss, (0, 1)), (x, kernel)
    tangents = jnp.cos(x), jnp.cos(kernel)
    squares = lambda *arrays: sum(jnp.sum(g**2) for g in gradient(*arrays))
    images = jnp.stack([x, 2 * x])
    return {
        "jvp": jax.jvp(convolve, arrays, tangents),
        "forward over reverse": jax.jvp(gradient, arrays, tangents),
        "reverse over reverse": jax.grad(squares, (0, 1))(*arrays),
        "vmap": jax.vmap(gradient, (0, None))(images, kernel),
        "vmap of kernels": jax.vmap(gradient, (None, 0))(x, jnp.stack([kernel, 2 * kernel])),
        "scan": jax.lax.scan(
            lambda total, x: (total + loss(x, kernel), gradient(x, kernel)), 0.0, images
        ),
        "remat": jax.grad(jax.checkpoint(loss), (0, 1))(*arrays),
        "linearize": jax.linearize(convolve, *arrays)[1](*tangents),
    }


@pytest.mark.parametrize("case", ["few from many", "3x3 of an image", "1x1", "deep", "depthwise"])
def test_every_transformation_goes_through(case):
    layers = LAYERS | {"depthwise": (1, 6, 3, 2, "SAME")}
    _, features, size, stride, padding = layers[case]
    groups = features if case == "depthwise" else 1

    def convolve(x, kernel):
        conv = nn.Conv(
            features,
            (size, size),
            strides=stride,
            padding=padding,
            feature_group_count=groups,
            use_bias=False,
        )
        return conv.apply({"params": {"kernel": kernel}}, x)

    with jax.enable_x64(True):
        arrays, _ = layer(*layers[case])
        arrays = jnp.tile(arrays[0], groups), arrays[1]
        fast = jax.jit(functools.partial(derivatives, cpu.fast(convolve)))(*arrays)
        expected = jax.jit(functools.partial(derivatives, convolve))(*arrays)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    jax.tree.map(close, fast, expected)


def test_a_convolution_runs_without_jit_and_in_bfloat16():
    arrays, options = layer(*LAYERS["few from many"], dtype="bfloat16")
    fast, expected = (with_gradients(c, options)(*arrays) for c in (convolution, plain))
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0.1, atol=0.3)


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
        {"conv_general_dilated": plain},  # somebody else's
    ],
    ids=lambda options: " ".join(
        f"{name}={value}" for name, value in options.items() if value != plain
    ),
)
def test_a_layer_without_a_fast_form_is_flaxs(options):
    """The very program, gradients included."""
    options = {"features": 6, "kernel_size": (3, 3)} | options
    if "conv_general_dilated" in options:
        options["conv_general_dilated"] = lambda x, kernel, *_, **__: x.sum() * kernel[:1]
    x = jax.ShapeDtypeStruct((2, *(9, 7, 5)[: len(options["kernel_size"])], 4), "float32")
    conv = nn.Conv(**options)
    variables = jax.eval_shape(conv.init, jax.random.key(0), x)

    def loss(variables, x):
        return jnp.sin(conv.apply(variables, x)).sum()

    def program(loss):
        return str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(variables, x))

    assert program(cpu.fast(loss)) == program(loss)


def test_the_precision_of_the_context_is_kept():
    arrays, options = layer(*LAYERS["few from many"], dtype="float32")
    program = lambda: str(jax.make_jaxpr(lambda *arrays: convolution(*arrays, *options))(*arrays))
    assert " conv[" in program()
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in program()


@pytest.mark.parametrize("options", [{"batch_group_count": 2}, {"an_option_of_later": 1}])
def test_every_option_reaches_xla(options, monkeypatch):
    received = []
    x = jnp.zeros((1, 4, 4, 1))
    monkeypatch.setattr(jax.lax, "conv_general_dilated", lambda *_, **o: received.append(o) or x)
    convolution(x, jnp.zeros((3, 3, 1, 1)), (1, 1), "SAME", **options)
    assert received[0].items() >= options.items()


def test_a_network_is_the_same_function_and_models_alone_are_flaxs():
    config = base.get_config().model
    config.widths, config.convs_per_level = (3, 20), 1
    config.upsampling_options.kernel_size = 3
    model = models.build(config, num_classes=3)
    image = jax.random.normal(jax.random.key(0), (2, 16, 12, 3))
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(1), image)

    def step(params):
        logits, new = model.apply(
            variables | {"params": params}, image, train=True, mutable=["batch_stats"]
        )
        return jnp.sin(logits).mean(), new

    gradient, fast = (jax.value_and_grad(f, has_aux=True) for f in (step, cpu.fast(step)))
    params = variables["params"]
    assert " input_gradient[" not in str(jax.make_jaxpr(gradient)(params))
    assert " input_gradient[" in str(jax.make_jaxpr(fast)(params))
    assert "conv_general_dilated" not in str(jax.make_jaxpr(fast)(params))  # upsampling included
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, jax.jit(fast)(params), jax.jit(gradient)(params))


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


def outcome(norm, x, *, fast, variables=None):
    """The result, gradients and new averages of a norm."""

    def loss(params, x):
        y, new = norm.apply(variables | {"params": params}, x, mutable=["batch_stats"])
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return (weights * y).sum(), (y, new)

    variables = variables or norm.init(jax.random.key(0), x)
    gradient = jax.grad(cpu.fast(loss) if fast else loss, (0, 1), has_aux=True)
    return jax.jit(gradient)(variables["params"], x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_is_flaxs(train, dtype):
    """Its result, gradients, variables and running averages."""
    norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(0.5, 2, (3, 5, 4, 6)), dtype)
    fresh = norm.init(jax.random.key(0), x)
    again = cpu.fast(norm.init)(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, again, fresh)
    variables = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 2, v.shape), v.dtype), fresh)
    fast, expected = (
        outcome(norm, x, fast=is_fast, variables=variables) for is_fast in (True, False)
    )
    assert jax.tree.structure(fast) == jax.tree.structure(expected)
    tolerance = 1e-4 if dtype == "float32" else 0.1
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(value, np.float64) for value in (a, b))
        if not train:
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{"axis": 1}, {"use_bias": False}, {"param_dtype": "bfloat16"}])
def test_a_batch_norm_without_a_fast_form_is_flaxs(options):
    norm = nn.BatchNorm(False, **options)
    x = jax.ShapeDtypeStruct((2, 4, 3, 5), "float32")
    program = lambda init: str(jax.make_jaxpr(init)(jax.random.key(0), x))
    assert program(cpu.fast(norm.init_with_output)) == program(norm.init_with_output)


@pytest.mark.parametrize("mean", [0.0, 1000.0, -3000.0])
@pytest.mark.parametrize("is_fast", [True, False])
def test_batch_norm_is_exact_far_from_zero(mean, is_fast):
    """In float32, next to flax's in float64: result, gradients and running averages."""
    rng = np.random.default_rng(0)
    x = rng.normal(mean, 1, (4, 8, 6, 3)).astype(np.float32)
    x[0, 0, 0] += 20  # a corner that is like nothing else
    # As in models.layers.Norm.
    norm = nn.BatchNorm(False, momentum=0.9, epsilon=1e-5, use_fast_variance=False)
    single = outcome(norm, jnp.asarray(x), fast=is_fast)
    with jax.enable_x64(True):
        expected = outcome(norm, jnp.asarray(x, "float64"), fast=False)
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
