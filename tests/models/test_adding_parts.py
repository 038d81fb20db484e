"""Tests that a new encoder or decoder only needs a class and a line that registers the class."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dense_jax import models
from dense_jax.models.decoders import DECODERS
from dense_jax.models.encoders import ENCODERS, Entry
from dense_jax.models.layers import ConvNorm, Project
from dense_jax.models.segmenter import Decoder, Encoder, Pyramid, Spec
from experiments import base


class Hypercolumns(Decoder):
    """Concatenates all fused maps at stride 1 and classifies each pixel (arXiv 1411.5752).

    column_channels: The number of channels of each map in the columns.
    """

    column_channels: int = 8

    @nn.compact
    def __call__(self, pyramid, *, train):
        maps = []
        for stride in self.fused_strides(pyramid):
            project = Project(self.column_channels, self.dtype, name=f"project{stride}")
            x = project(pyramid.features[stride])
            maps.append(self.enlarge(x, stride, 1, f"enlarge{stride}"))
        return self.classify(jnp.concatenate(maps, axis=-1), stride=1), {}


class Dilated(Encoder):
    """A stem of stride 4, and stages whose dilation grows instead of their stride."""

    width: int = 6

    @property
    def spec(self):
        return Spec((4,))

    @nn.compact
    def __call__(self, image, *, train):
        make = functools.partial(ConvNorm, self.width, norm=self.norm, dtype=self.dtype)
        x = self.stage(make(5, stride=4, name="stem"))(image, train)
        x = self.stage(*(make(dilation=d, name=f"dilated{d}") for d in (1, 2, 4)))(x, train)
        return Pyramid({4: nn.Dropout(self.dropout, deterministic=not train)(x)})


@pytest.fixture(autouse=True)
def added(monkeypatch):
    monkeypatch.setitem(DECODERS, "hypercolumns", Hypercolumns)
    monkeypatch.setitem(ENCODERS, "dilated", Entry(Dilated))


def make(**fields):
    config = base.get_config().model
    with config.unlocked(), config.ignore_type():
        config.update({"widths": (3, 4, 5)} | fields)
    return models.build(config, num_classes=3)


def outcome(model, size):
    """The gradient of a training pass, the logits of an evaluation, and the shape of both."""
    image = jnp.cos(jnp.arange(2 * 3 * size[0] * size[1], dtype=jnp.float32))
    image = image.reshape(2, *size, 3)

    def run(key):
        variables = model.init(key, image, train=False)

        def loss(params):
            logits, _ = model.apply(
                variables | {"params": params},
                image,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return jnp.var(logits)

        return jax.grad(loss)(variables["params"]), model.apply(variables, image, train=False)

    return run


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"name": "hypercolumns"}, (13, 6)),
        ({"name": "hypercolumns", "encoder": "resnet18", "skips": (8, 4)}, (33, 20)),
        ({"name": "hypercolumns", "encoder": "dilated", "column_channels": 4}, (5, 9)),
        (
            {"name": "hypercolumns", "encoder": "dilated", "upsampling": "nearest", "skips": ()},
            (1, 1),
        ),
        ({"name": "unet", "encoder": "dilated", "dropout": 0.5, "remat": True}, (9, 7)),
        ({"name": "fcn", "encoder": "dilated", "norm": "group"}, (1, 3)),
    ],
    ids=str,
)
def test_an_added_part_has_logits_of_any_size(fields, size):
    _, logits = jax.eval_shape(outcome(make(**fields), size), jax.random.key(0))
    assert logits.shape == (2, *size, 3) and logits.dtype == jnp.float32


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "hypercolumns", "widths": (2, 3), "convs_per_level": 1},
        {"name": "fcn", "encoder": "dilated", "remat": True},
    ],
    ids=str,
)
def test_every_parameter_of_an_added_part_is_trained(fields):
    run = outcome(make(**fields, norm="none", upsampling="nearest"), (6, 5))
    gradient, logits = jax.jit(run)(jax.random.key(0))
    assert np.all(np.isfinite(logits))
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        # The variance of the logits has no gradient for a bias that all pixels share.
        assert np.any(g) or path[-1].key == "bias", path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "hypercolumns", "upsampling": "max_unpool"}, "never pooled"),
        ({"name": "hypercolumns", "padding": "VALID"}, "use 'SAME'"),
        (
            {"name": "hypercolumns", "decoder_relu": False},
            "neither 'hypercolumns' nor 'plain' has it",
        ),
        ({"encoder": "dilated", "skips": (2,)}, "model.skips: 2 is not one of none"),
        (
            {"encoder": "dilated", "upsampling": "max_unpool"},
            r"no switches, at the strides \[1, 2\]",
        ),
        (
            {"encoder": "dilated", "name": "hypercolumn"},
            "is not one of 'fcn', 'unet', .*'hypercolumns'; did you mean 'hypercolumns'",
        ),
    ],
    ids=str,
)
def test_what_an_added_part_cannot_do_is_said(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_dilated_taps_are_seen():
    """Each pixel of the dilated stages sees 1 + 2 + 4 cells on every side, in a stem's window."""
    from tests.models.measures import receptive_field

    model = make(name="fcn", encoder="dilated", norm="none", upsampling="nearest")
    rows, _ = receptive_field(model, (96, 96), channels=1)
    assert rows.stop - rows.start == 2 * 7 * 4 + 5
