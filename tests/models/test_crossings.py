"""Tests that every encoder and decoder build a network for images of any size, channels and dtype.

The suite checks the shapes for every encoder and every decoder. All pairs, and a training step and an
export of every part, take some minutes:

    DENSE_JAX_CROSSINGS=all python -m pytest tests/models/test_crossings.py
"""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from dense_jax import losses, models
from dense_jax.models.decoders import DECODERS
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.normalization import NORMALIZATIONS
from experiments import base
from tests.models import COVERING, FAMILIES, has

PAIRS = list(zip(FAMILIES, itertools.cycle(DECODERS), strict=False))
if os.environ.get("DENSE_JAX_CROSSINGS") == "all":
    PAIRS = list(itertools.product(ENCODERS, DECODERS))
IMAGES = [((1, 1), 1, "float32"), ((97, 131), 12, "bfloat16"), ((33, 2), 4, "float32")]


def make(encoder, name, dtype="float32", upsampling="nearest", **fields):
    config = base.get_config().model
    config.update(encoder=encoder, name=name, dtype=dtype, upsampling=upsampling, **fields)
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
    narrow = {"decoder_channels": 8} if has(DECODERS[name], "decoder_channels") else {}
    model = make("plain", name, widths=(2, 3, 4), norm="none", **narrow)
    image = jax.random.normal(jax.random.key(0), (1, 12, 8, 3))

    @jax.jit
    def gradient(key):
        variables = model.init(key, image, train=False)

        def loss(params):
            return jnp.sum(jnp.sin(model.apply({"params": params}, image, train=True)))

        return jax.grad(loss)(variables["params"])

    moved = jax.tree.map(lambda g: bool(jnp.any(g != 0)), gradient(jax.random.key(1)))
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.skipif(os.environ.get("DENSE_JAX_CROSSINGS") != "all", reason="takes minutes")
@pytest.mark.parametrize(("encoder", "name", "method"), COVERING)
def test_a_network_of_any_parts_trains_a_step_and_is_exported(encoder, name, method):
    narrow = {"width_multiplier": 0.125} if has(ENCODERS[encoder].make, "width_multiplier") else {}
    model = make(encoder, name, upsampling=method, widths=(2, 3, 4, 5), **narrow)
    image = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    label = jnp.zeros((2, 64, 64), jnp.int32).at[:, 20:].set(2)
    tx = optax.adam(1e-3)

    @jax.jit
    def start(key):
        variables = model.init(key, image, train=False)
        return {"batch_stats": {}, **variables}, tx.init(variables["params"])

    @jax.jit
    def step(variables, opt_state):
        def loss_of(params):
            logits, changed = model.apply(
                variables | {"params": params},
                image,
                train=True,
                mutable=["batch_stats", "intermediates"],
                rngs={"dropout": jax.random.key(1)},
            )
            return losses.cross_entropy(logits, label), changed.get("batch_stats", {})

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": stats}, opt_state, loss

    before, opt_state = start(jax.random.key(2))
    variables, _, loss = step(before, opt_state)
    assert jnp.isfinite(loss)
    moved = jax.tree.map(
        jnp.any, jax.tree.map(jnp.not_equal, before["params"], variables["params"])
    )
    assert any(jax.tree.leaves(moved["encoder"])) and any(jax.tree.leaves(moved["decoder"]))

    def forward(variables, image):
        return model.apply(variables, image, train=False)

    program = export.deserialize(export.export(jax.jit(forward))(variables, image).serialize())
    np.testing.assert_array_equal(
        program.call(variables, image), jax.jit(forward)(variables, image)
    )
