"""Tests the inputs and outputs of the pure steps, and that sharding changes nothing."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from dense_jax import losses
from dense_jax.data import Field
from dense_jax.devices import mesh
from dense_jax.labels import IGNORE_LABEL
from dense_jax.models.normalization import unit
from dense_jax.training import steps
from dense_jax.training.augment import augment_batch
from tests.conftest import mesh_of

random_crops = functools.partial(augment_batch, crop_size=(8, 8), num_classes=3)


class Net(nn.Module):
    """A convolution, a batch norm and dropout: statistics, gradients and a random mask."""

    rate: float = 0.0
    norm: bool = True

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.Conv(4, (3, 3))(image)
        if self.norm:
            x = nn.BatchNorm(not train, momentum=0.5)(x)
        x = nn.Dropout(self.rate, deterministic=not train)(jax.nn.relu(x))
        return nn.Conv(3, (1, 1))(x)


def batch(size=8, index=0):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (size, 12, 12, 3), np.uint8),
        "label": rng.integers(0, 3, (size, 12, 12)).astype(np.uint8),
        "size": np.full((size, 2), 12, np.int32),
        "index": np.arange(index, index + size, dtype=np.uint32),
    }


def make_step(net=None, seed=0, augment=None, loss=losses.cross_entropy, **options):
    augment = augment or functools.partial(random_crops, flip=0.5, scale=0.3)
    return functools.partial(
        steps.train_step,
        key=jax.random.key(seed),
        model=net or Net(),
        tx=optax.sgd(0.1, momentum=0.9),
        loss_fn=loss,
        augment=augment,
        normalize=unit,
        **options,
    )


def init(with_ema=False, net=None):
    image = jnp.zeros((1, 12, 12, 3))
    return steps.init_state(
        jax.random.key(0),
        init=lambda key: (net or Net()).init(key, image, train=False),
        tx=optax.sgd(0.1, momentum=0.9),
        with_ema=with_ema,
    )


def test_a_step_is_the_same_over_one_and_four_devices():
    results = []
    for num_devices in (1, 4):
        devices = mesh_of(num_devices)
        step = jax.jit(
            make_step(Net(0.5)), in_shardings=(mesh.replicated(devices), mesh.sharded(devices))
        )
        results.append(step(init(), mesh.to_global(batch(), devices)))
    (one, metrics_one), (four, metrics_four) = results
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(metrics_one["train/loss"], metrics_four["train/loss"], rtol=1e-5)


def test_a_step_moves_everything_it_should():
    state = init(with_ema=True)
    new, _ = jax.jit(make_step(ema_decay=0.9))(state, batch())
    assert new.step == 1
    for field in ("params", "batch_stats", "opt_state", "ema"):
        old_leaves, new_leaves = (jax.tree.leaves(getattr(s, field)) for s in (state, new))
        assert any(np.any(a != b) for a, b in zip(old_leaves, new_leaves, strict=True)), field


def test_the_average_starts_from_the_first_steps():
    """decay is at most (1 + t) / (10 + t): the first average is 0.1 of the old, 0.9 of the new."""
    state = init(with_ema=True)
    new, _ = jax.jit(make_step(ema_decay=0.99))(state, batch())
    expected = jax.tree.map(lambda old, x: 0.1 * old + 0.9 * x, state.params, new.params)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(new.ema["params"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_examples_are_augmented_by_their_own_number():
    """The same examples in another order give the same loss; other numbers give another one."""
    step = jax.jit(make_step())
    there = batch()
    back = {name: array[::-1] for name, array in there.items()}
    _, values = step(init(), there)
    _, reordered = step(init(), back)
    _, renumbered = step(init(), batch(index=8))
    np.testing.assert_allclose(values["train/loss"], reordered["train/loss"], rtol=1e-6)
    assert abs(values["train/loss"] - renumbered["train/loss"]) > 1e-4


def test_the_loss_gets_what_moved_with_the_label():
    there = batch()
    there["border"] = np.full(there["label"].shape, 2, np.float32)

    def loss(logits, label, border):
        return jnp.mean(jnp.isclose(border, jnp.where(label == IGNORE_LABEL, 0, 2)))

    augment = functools.partial(random_crops, fields=[Field("border")])
    _, values = jax.jit(make_step(augment=augment, loss=loss))(init(), there)
    assert values["train/loss"] == 1


def test_auxiliary_losses_add_to_the_loss_by_their_weights():
    """With logits of their own at strides 2 and 4, half and a quarter of the main logits."""

    class Supervised(nn.Module):
        @nn.compact
        def __call__(self, image, *, train):
            logits = Net(norm=False)(image, train=train)
            self.sow("intermediates", "auxiliary_logits", {2: logits / 2, 4: logits / 4})
            return logits

    net, there = Supervised(), batch()
    still = lambda key, example: {name: example[name] for name in ("image", "label")}
    step = make_step(net, augment=still, auxiliary={2: 0.5, 4: 3.0})
    state = init(net=net)
    new, values = jax.jit(step)(state, there)

    def total(params):
        logits = net.apply({"params": params}, unit(jnp.asarray(there["image"])), train=False)
        parts = [losses.cross_entropy(logits / stride, there["label"]) for stride in (1, 2, 4)]
        return parts[0] + 0.5 * parts[1] + 3 * parts[2], parts

    (_, parts), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(state.params)
    names = ("train/loss", "train/auxiliary_loss/2", "train/auxiliary_loss/4")
    np.testing.assert_allclose([values[name] for name in names], parts, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, new.params, expected)


def test_dropout_depends_on_the_step_and_the_seed():
    # Nothing else is random.
    still = lambda key, example: {name: example[name] for name in ("image", "label")}

    def loss(seed, step):
        train_step = jax.jit(make_step(Net(0.5), seed=seed, augment=still))
        _, values = train_step(init().replace(step=jnp.int32(step)), batch())
        return float(values["train/loss"])

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_split_optimizer_state_gathers_parameters_and_nothing_else(num_microbatches):
    devices, state = mesh_of(4), init()
    whole = jax.tree.map(lambda _: mesh.replicated(devices), state)
    split = whole.replace(opt_state=mesh.spread(state.opt_state, devices))
    there, results = mesh.to_global(batch(), devices), []
    for placement in (whole, split):
        step = jax.jit(
            make_step(num_microbatches=num_microbatches),
            in_shardings=(placement, mesh.sharded(devices)),
            out_shardings=(placement, mesh.replicated(devices)),
        )
        results.append(step(state, there))
        text = step.lower(state, there).compile().as_text()
        moved = re.findall(r" (all-gather|all-to-all|collective-permute)\(", text)
        assert moved == ["all-gather"] * 2 * (placement is split)  # the two kernels
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *results)
    trace = jax.tree.leaves(results[1][0].opt_state)
    assert any(x.addressable_shards[0].data.size == x.size / 4 for x in trace)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_microbatches_of_equal_weight_give_the_step_of_the_batch(num_devices):
    """And no example moves to another device for it."""
    net, devices = Net(norm=False), mesh_of(num_devices)
    shardings = mesh.replicated(devices), mesh.sharded(devices)
    runs = {}
    for k in (1, 2, 4):
        augment = functools.partial(random_crops, flip=0.5)  # ignores no pixel
        step = make_step(net, augment=augment, num_microbatches=k, ema_decay=0.9)
        step = jax.jit(step, in_shardings=shardings)
        state = init(with_ema=True, net=net)
        for n in range(2):
            there = mesh.to_global(batch(16, index=16 * n), devices)
            state, values = step(state, there)
        runs[k] = state, values
        assert ("scan[" in str(jax.make_jaxpr(step)(state, there))) == (k > 1)
        text = step.lower(state, there).compile().as_text()
        assert not re.search("all-gather|all-to-all|collective-permute", text)
    for k in (2, 4):
        assert runs[k][0].step == 2
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), runs[k], runs[1])


def test_each_microbatch_has_its_own_normalization_and_batch_statistics():
    """The step's gradient and loss are the mean of theirs; the running averages take each in turn."""
    there, state = batch(), init()
    there["label"][::2, :6] = IGNORE_LABEL  # of the first microbatch
    new, values = jax.jit(make_step(num_microbatches=2))(state, there)
    parts, stats = [], state.batch_stats
    for m in range(2):
        part = {name: array[m::2] for name, array in there.items()}
        parts.append(jax.jit(make_step())(state.replace(batch_stats=stats), part))
        stats = parts[-1][0].batch_stats
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, new.batch_stats, stats)
    # The first step of SGD is linear in the gradient.
    jax.tree.map(lambda x, a, b: close(x, (a + b) / 2), new.params, *(p.params for p, _ in parts))
    losses = [each["train/loss"] for _, each in parts]
    close(values["train/loss"], np.mean(losses))
    assert abs(losses[0] - losses[1]) > 1e-3


def test_every_microbatch_has_its_own_dropout():
    """Of two times the same examples, the loss is not that of the examples, but with no dropout."""
    once = batch(4)
    twice = {name: array.repeat(2, axis=0) for name, array in once.items()}
    for rate in (0.0, 0.5):
        one, two = (
            jax.jit(make_step(Net(rate), num_microbatches=k))(init(), examples)[1]["train/loss"]
            for k, examples in ((1, once), (2, twice))
        )
        assert np.isclose(one, two, rtol=1e-5) == (rate == 0)


def test_microbatches_save_memory():
    sizes = [
        jax.jit(make_step(num_microbatches=k))
        .lower(init(), batch(32))
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for k in (1, 4)
    ]
    assert sizes[1] < sizes[0] / 2
