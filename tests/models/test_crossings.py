"""Tests that every encoder and decoder build a network for images of any size, channels and dtype.

The suite checks every encoder and every decoder. All pairs take some minutes:

    DENSE_JAX_CROSSINGS=all python -m pytest tests/models/test_crossings.py
"""

import itertools
import os

import jax
import jax.numpy as jnp
import pytest

from dense_jax import models
from dense_jax.models.decoders import DECODERS
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.normalization import NORMALIZATIONS
from experiments import base
from tests.models import FAMILIES

PAIRS = list(zip(FAMILIES, itertools.cycle(DECODERS), strict=False))
if os.environ.get("DENSE_JAX_CROSSINGS") == "all":
    PAIRS = list(itertools.product(ENCODERS, DECODERS))
IMAGES = [((1, 1), 1, "float32"), ((97, 131), 12, "bfloat16"), ((33, 2), 4, "float32")]


def make(encoder, name, dtype="float32", **fields):
    config = base.get_config().model
    config.update(encoder=encoder, name=name, dtype=dtype, upsampling="nearest", **fields)
    return models.build(config, num_classes=3)


@pytest.mark.parametrize(("encoder", "name"), PAIRS)
def test_logits_have_the_size_of_any_image(encoder, name):
    normalize = NORMALIZATIONS["imagenet"]
    every = os.environ.get("DENSE_JAX_CROSSINGS") == "all"
    for size, channels, dtype in IMAGES if every else IMAGES[:2]:
        model = make(encoder, name, dtype)

        def network(key, image, model=model):
            return model.init_with_output(key, normalize(image), train=False)[0]

        image = jax.ShapeDtypeStruct((2, *size, channels), jnp.uint8)
        logits = jax.eval_shape(network, jax.random.key(0), image)
        assert (logits.shape, logits.dtype) == ((2, *size, 3), jnp.float32)


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in ("fcn", "unet")])
def test_every_parameter_of_a_decoder_learns(name):
    model = make("plain", name, widths=(2, 3, 4), norm="none", decoder_channels=8)
    image = jax.random.normal(jax.random.key(0), (1, 12, 8, 3))

    @jax.jit
    def gradient(key):
        variables = model.init(key, image, train=False)

        def loss(params):
            return jnp.sum(jnp.sin(model.apply({"params": params}, image, train=True)))

        return jax.grad(loss)(variables["params"])

    moved = jax.tree.map(lambda g: bool(jnp.any(g != 0)), gradient(jax.random.key(1)))
    assert all(jax.tree.leaves(moved)), moved
