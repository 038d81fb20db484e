"""Tests that functions converted to ONNX compute in onnxruntime what they compute in JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dense_jax import export, trained
from dense_jax.program import assemble
from experiments import base

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
onnx_graph = pytest.importorskip("dense_jax.inference.onnx_graph")

pytestmark = pytest.mark.usefixtures("unchecked_shapes")
RNG = np.random.default_rng(0)


def computed(function, images):
    """The results of a function in JAX and, converted, in onnxruntime."""
    shape = jax.ShapeDtypeStruct(images.shape[1:], images.dtype)
    session = onnxruntime.InferenceSession(onnx_graph.convert(function, shape, "y", {}))
    (result,) = session.run(["y"], {"images": images})
    expected = np.asarray(jax.jit(function)(images))
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    assert np.ptp(expected) > 0
    return result, expected


KERNEL = RNG.normal(size=(3, 2, 4, 6)).astype(np.float32)
window = functools.partial(lax.reduce_window, computation=lax.max, init_value=-jnp.inf)


@pytest.mark.parametrize(
    "function",
    {
        "interior, negative and uneven padding": lambda x: lax.pad(
            x, 2.0, ((0, 0, 0), (-1, 2, 2), (3, -2, 1), (0, 1, 0))
        ),
        "strided convolution": lambda x: lax.conv_general_dilated(
            *(x, KERNEL, (2, 1), ((1, 0), (2, 1))),
            rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ),
        "depthwise convolution": lambda x: lax.conv_general_dilated(
            *(x, KERNEL.reshape(3, 2, 1, 24)[..., :8], (1, 1), "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        ),
        "max-pool": lambda x: window(
            x,
            window_dimensions=(1, 3, 2, 1),
            window_strides=(1, 2, 1, 1),
            padding=((0, 0), (1, 0), (0, 1), (0, 0)),
        ),
        "products": lambda x: jnp.einsum(
            "bhwc,bhvc,Hh->bwHv", x, x, KERNEL[:2, :, 0, 0].T[:, [0] * 5]
        ),
        "steps": lambda x: lax.slice(x, (0, 0, 1, 0), (*x.shape[:1], 5, 6, 4), (1, 2, 3, 1)),
        "constant indices": lambda x: x[:, 3, :, 2],
        "take": lambda x: jnp.take(x, np.array([3, 0, 0]), axis=2),
        "take along an axis": lambda x: jnp.take_along_axis(
            x, jnp.argsort(np.ones(5)).astype(int)[None, :, None, None] + (x[:, :, :1, :1] > 0), 1
        ),
        "choices": lambda x: jnp.where(
            (x > 0) & (x != jnp.max(x, axis=-1, keepdims=True)), jnp.clip(x, 0.1, 0.5), -x
        ),
        "functions": lambda x: jax.nn.gelu(x, approximate=False) + jax.nn.hard_swish(x) + x**3,
        "softmax": lambda x: jax.nn.softmax(x, axis=1),
        "edges": lambda x: jnp.pad(x, ((0, 0), (2, 1), (0, 0), (0, 0)), mode="edge"),
        "arg-max": lambda x: jnp.argmax(x, axis=2),
        "largest": lambda x: lax.top_k(x, 2)[0],
        "a constant for each image": lambda x: jnp.concatenate(
            [x, jnp.ones((x.shape[0], 5, 1, 4))], 2
        ),
    }.items(),
    ids=lambda item: item[0],
)
def test_primitives(function):
    result, expected = computed(function[1], RNG.normal(size=(2, 5, 7, 4)).astype(np.float32))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_what_has_no_rule_is_named():
    shape = jax.ShapeDtypeStruct((4, 4, 3), np.float32)
    with pytest.raises(ValueError, match="cannot be written as ONNX: no rule for 'cumsum'"):
        onnx_graph.convert(lambda x: jnp.cumsum(x, axis=1), shape, "y", {})


def a_network(dtype="uint8", **fields):
    """A network with random weights, as if loaded from a workdir."""
    config = base.get_config()
    config.model.widths = (2, 3)
    with config.ignore_type():
        config.update_from_flattened_dict(fields)
    dataset = {"class_names": ["a", "b", "c"], "num_channels": 3, "dtype": dtype}
    dataset |= {"value_range": [0, 60000], "levels": [[1, 2, 3], [200, 210, 220]]}
    program = assemble(config, 3)
    variables = jax.tree.map(
        lambda x: RNG.uniform(-0.2, 0.5, x.shape).astype(x.dtype), program.variables(3)
    )
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: abs(x) if path[-1].key == "var" else x, variables
    )
    return trained.Trained(config, dataset, program, 0, variables, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"model.upsampling": "dysample"},
        {"model.padding": "VALID", "model.dtype": "bfloat16"},
        {"data.resolution": 0.6, "model.normalization": "imagenet", "model.fusion": "gated"},
        {"dtype": "uint16", "model.normalization": "percentiles", "model.norm": "group"},
    ],
    ids=str,
)
def test_networks(fields):
    """`benchmarks.onnx_files` compares networks of all parts."""
    network = a_network(**fields)
    images = RNG.integers(0, 256, (2, 33, 38, 3)).astype(network.dataset["dtype"])
    function = functools.partial(export.segment, network, result="probabilities")
    result, expected = computed(function, images)
    assert np.abs(result - expected).max() < 1e-4
