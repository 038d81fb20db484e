"""Tests what some encoders have beyond the contract: dilation, skipped blocks, dtypes of layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dense_jax.models.encoders import ENCODERS
from dense_jax.models.encoders.convnext import ConvNeXt
from dense_jax.models.encoders.inverted_residual import InvertedResiduals, Stage
from dense_jax.models.encoders.mit import MiT
from dense_jax.models.layers import drop_path

STAGES = tuple(
    Stage(channels, kernel_size, stride, expanded, jax.nn.relu)
    for channels, kernel_size, stride, expanded in (
        (4, 3, 2, (6,)),
        (5, 5, 2, (7, 8)),
        (6, 5, 2, (9, 10)),
        (6, 3, 1, (11,)),
        (7, 3, 2, (12, 13)),
    )
)
inverted_residuals = functools.partial(
    InvertedResiduals, stem=4, stages=STAGES, activation=jax.nn.relu, conv_options={}
)


def random_variables(encoder, image):
    rng = np.random.default_rng(0)
    init = functools.partial(encoder.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), image)
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.2, 0.8, x.shape), x.dtype), shapes)


@pytest.mark.parametrize(("options", "last"), [({}, 0), ({"padding": "SAME"}, 1)], ids=str)
def test_dilation_computes_the_published_features_at_more_pixels(options, last):
    """Padding as in TensorFlow centers a feature on the last pixel of its cell, not the first."""
    image = jax.random.normal(jax.random.key(0), (1, 64, 96, 3))
    encoders = [inverted_residuals(conv_options=options, output_stride=s) for s in (8, 32)]
    variables = random_variables(encoders[0], image)
    dense, published = (
        jax.jit(functools.partial(encoder.apply, train=False))(variables, image).features
        for encoder in encoders
    )
    assert dense.keys() == {2, 4, 8}
    dense = dense[8][:, 3 * last :: 4, 3 * last :: 4]
    np.testing.assert_allclose(dense, published[32], rtol=1e-4)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return drop_path(x, 0.3, train)


def test_a_path_is_dropped_for_a_whole_image_and_keeps_its_mean():
    x = jnp.ones((400, 2, 3, 4))
    y = np.asarray(Dropped().apply({}, x, True, rngs={"dropout": jax.random.key(0)}))
    kept = y[:, 0, 0, 0] > 0
    np.testing.assert_allclose(y, np.where(kept, 1 / 0.7, 0)[:, None, None, None] * x, rtol=1e-6)
    assert 0.6 < kept.mean() < 0.8
    np.testing.assert_array_equal(Dropped().apply({}, x, False), x)


@pytest.mark.parametrize(
    "make",
    [
        inverted_residuals,
        functools.partial(ConvNeXt, depths=(1, 1, 1, 1), width_multiplier=1 / 48),
        functools.partial(MiT, depths=(1, 1, 1, 1), head_width=2),
    ],
    ids=["inverted_residuals", "convnext", "mit"],
)
def test_the_first_block_is_never_skipped_and_later_ones_ever_more_often(make):
    """With the highest rate, most images have other deepest features, and no random first ones."""
    image = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (32, 32, 3)), (16, 32, 32, 3))
    encoder = make(norm="none", drop_path=0.5)
    variables = random_variables(encoder, image)
    apply = jax.jit(functools.partial(encoder.apply, train=True))
    features = apply(variables, image, rngs={"dropout": jax.random.key(1)}).features
    distinct = {
        stride: len(np.unique(np.asarray(x).reshape(16, -1).round(4), axis=0))
        for stride, x in features.items()
    }
    first, *_, deepest = sorted(distinct)
    assert distinct[first] == 1 < distinct[deepest]


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "convnext_tiny", "mit_b0"])
def test_features_have_the_dtype_of_the_computation(name):
    """Also behind layer norms, attention and means."""
    encoder = ENCODERS[name].make(width_multiplier=1 / 32, dtype=jnp.bfloat16)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)

    def init(image):
        pyramid, variables = encoder.init_with_output(jax.random.key(0), image, train=False)
        return pyramid.features, variables

    features, variables = jax.eval_shape(init, image)
    assert {x.dtype for x in features.values()} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
