"""Tests the schedules, and that weight decay skips norms and biases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dense_jax.training import optim


@pytest.mark.parametrize(
    ("name", "halfway", "end"), [("constant", 1, 1), ("cosine", 0.5, 0), ("poly", 0.5**0.9, 0)]
)
def test_schedules(name, halfway, end):
    schedule = optim.make_schedule(name, 0.1, warmup_steps=10, num_steps=110)
    np.testing.assert_allclose(schedule(0), 0)
    np.testing.assert_allclose(schedule(5), 0.05, rtol=1e-6)
    np.testing.assert_allclose(schedule(10), 0.1, rtol=1e-6)
    np.testing.assert_allclose(schedule(60), 0.1 * halfway, rtol=1e-5)
    np.testing.assert_allclose(schedule(110), 0.1 * end, atol=1e-8)


def test_no_warm_up_starts_at_the_top():
    schedule = optim.make_schedule("cosine", 0.1, warmup_steps=0, num_steps=10)
    np.testing.assert_allclose(schedule(0), 0.1)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_only_weights_are_decayed(name):
    tx = optim.make_optimizer(
        name,
        optax.constant_schedule(0.5),
        momentum=0.9,
        weight_decay=0.1,
        grad_clip_norm=0.0,
    )
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    zero = {name: jnp.zeros_like(x) for name, x in params.items()}
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)
    np.testing.assert_array_equal(updates["scale"], 0)


@pytest.mark.parametrize(("limit", "expected"), [(0.0, 5.0), (1.0, 1.0), (10.0, 5.0)])
def test_clipping_by_global_norm(limit, expected):
    tx = optim.make_optimizer(
        "sgd", optax.constant_schedule(1.0), momentum=0.0, weight_decay=0.0, grad_clip_norm=limit
    )
    params = {"a": jnp.zeros((1, 1)), "b": jnp.zeros((1, 1))}
    gradient = {"a": jnp.full((1, 1), 3.0), "b": jnp.full((1, 1), 4.0)}
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), expected, rtol=1e-6)


def updates_of(name, params, gradients, **options):
    tx = optim.make_optimizer(
        *(name, optax.constant_schedule(0.5)),
        momentum=0.9,
        weight_decay=0.1,
        grad_clip_norm=1.0,
        **options,
    )
    return tx.update(gradients, tx.init(params), params)


PARAMS = {"encoder": {"kernel": jnp.ones((2, 2))}, "decoder": {"kernel": jnp.ones((2, 2))}}


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_the_encoder_moves_by_its_multiple(name):
    gradients = {part: {"kernel": jnp.full((2, 2), 3.0)} for part in PARAMS}
    plain, _ = updates_of(name, PARAMS, gradients)
    slower, _ = updates_of(name, PARAMS, gradients, encoder_lr_multiplier=0.25)
    np.testing.assert_allclose(
        slower["encoder"]["kernel"], 0.25 * plain["encoder"]["kernel"], rtol=1e-6
    )
    np.testing.assert_array_equal(slower["decoder"]["kernel"], plain["decoder"]["kernel"])


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_frozen_encoder_neither_moves_nor_has_moments(name):
    gradients = {part: {"kernel": jnp.full((2, 2), 3.0)} for part in PARAMS}
    updates, state = updates_of(name, PARAMS, gradients, freeze_encoder=True)
    _, trained = updates_of(name, PARAMS, gradients)
    np.testing.assert_array_equal(updates["encoder"]["kernel"], 0)
    assert np.all(np.asarray(updates["decoder"]["kernel"]))
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree) if x.ndim)
    assert size(state) == size(trained) / 2
