"""Tests that joined pixels give the results of separate pixels. test_tpu_steps counts their cycles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dense_jax import models
from dense_jax.devices import cpu, tpu
from dense_jax.models.layers import ConvNorm, max_pool
from dense_jax.models.upsampling.convolutions import TransposedConv
from experiments import base

conv = functools.partial(nn.Conv, 5)
up = functools.partial(TransposedConv, dtype="float64")


class Skip(nn.Module):
    """Pooling between two joined feature maps, which are then concatenated."""

    @nn.compact
    def __call__(self, x):
        x = ConvNorm(6, dtype=x.dtype, name="before")(x, train=True)
        y, switches = max_pool(x)
        y = TransposedConv(4, dtype=x.dtype, name="up")(jnp.where(switches == 1, 2 * y, y))
        both = jnp.concatenate([x, y, x[..., :2]], axis=-1)
        return nn.Conv(3, (1, 1))(conv((3, 3))(both)) + jnp.tanh(both[:, 1:-1, 2:-2]).sum()


class Gate(nn.Module):
    @nn.compact
    def __call__(self, x):
        return conv((3, 3))(x) * nn.Conv(1, (3, 3))(x) + nn.Conv(1, (1, 1))(x)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        convs = [ConvNorm(3, dtype=x.dtype, name=name) for name in ("first", "second")]
        y = jax.nn.relu(convs[1](convs[0](x, train=True), train=True) + x)
        return nn.GroupNorm(1)(y)


LAYERS = {
    "3x3": conv((3, 3)),
    "5x5": conv((5, 5)),
    "1x1 after 3x3": nn.Sequential([conv((3, 3)), nn.Conv(7, (1, 1))]),
    "even kernel": conv((4, 2)),
    "unpadded": nn.Sequential([conv((3, 3)), conv((3, 3), padding="VALID"), conv((3, 3))]),
    "unpadded rows": conv((3, 3), padding=((0, 0), (1, 1))),
    "strided": nn.Sequential([conv((3, 3)), conv((3, 3), strides=2), conv((3, 3))]),
    "dilated": nn.Sequential([conv((3, 3)), conv((3, 3), kernel_dilation=2)]),
    "narrow after wide": nn.Sequential([nn.Conv(65, (3, 3)), conv((3, 3))]),
    "skip": Skip(),
    "residual": Residual(),
    "gate": Gate(),
    **{f"transposed {k}": up(5, kernel_size=k) for k in (1, 2, 3, 4)},
    "transposed by 4": up(5, factor=4),
    "wide transposed": up(65),
}


def outcome(model, x, variables, *, in_pairs):
    """The result, the new statistics and the gradients of a module, in double precision."""
    apply = functools.partial(model.apply, mutable=["batch_stats"])
    apply = cpu.fast(tpu.in_pairs(apply) if in_pairs else apply)

    def loss(params, x):
        y, new = apply(variables | {"params": params}, x)
        return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y), (y, new)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)


def variables_of(model, x, rng):
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape)), shapes)


@pytest.mark.parametrize(
    ("name", "width"), [*((name, 6) for name in LAYERS), ("strided", 7), ("transposed 2", 7)]
)
def test_pairs_compute_the_same_as_pixels(name, width):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, 4, width, 3)))
        variables = variables_of(LAYERS[name], x, rng)
        pairs, pixels = (
            outcome(LAYERS[name], x, variables, in_pairs=is_paired) for is_paired in (True, False)
        )
    assert jax.tree.structure(pairs) == jax.tree.structure(pixels)
    for a, b in zip(jax.tree.leaves(pairs), jax.tree.leaves(pixels), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_pairs_stay_joined_from_the_first_convolution_to_the_logits():
    config = base.get_config().model
    config.widths = (64, 128)
    model = models.build(config, num_classes=3)
    image = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)
    options = {"train": True, "mutable": ["batch_stats"]}
    apply = cpu.fast(functools.partial(tpu.InPairs(model).apply, **options))
    equations = jax.make_jaxpr(apply)(variables, image).jaxpr.eqns
    large = [
        (e.primitive.name, var.aval.shape)
        for e in equations
        for var in e.outvars
        if var.aval.ndim == 4 and var.aval.shape[1:3] == (16, 16)
    ]
    # The logits are separated at the end, after the last 1x1 convolution.
    first = [name for name, _ in large].index("reshape")
    assert {shape[3] for _, shape in large[first:]} == {3}
    assert {shape[3] for _, shape in large[:first]} == {3}
    assert [e.invars[0].aval.shape for e in equations if e.primitive.name == "conv"] == [
        *((2, 16, 8, n) for n in (6, 128)),
        *((2, 8, 8, n) for n in (64, 128)),
        *((2, 16, 8, n) for n in (256, 128)),
    ]
