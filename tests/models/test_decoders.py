"""Tests the parts of decoders other than U-Net and FCN, and auxiliary heads."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from dense_jax import models
from dense_jax.models.decoders.upernet import pool
from experiments import base

NAMES = ("fpn", "deeplabv3plus", "upernet", "segformer")


def make(**fields):
    config = base.get_config().model
    config.widths = (2, 3, 4)
    config.convs_per_level = 1
    if fields.get("name", "unet") in NAMES:
        config.decoder_channels = 4
    with config.ignore_type():
        config.update_from_flattened_dict(fields)
    return models.build(config, num_classes=3)


def shapes_of(model, size=(8, 12)):
    """The shapes of the model's variables, and those of the logits and sown logits in training."""
    image = jnp.zeros((2, *size, 3))
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), image)
    apply = functools.partial(
        model.apply,
        train=True,
        mutable=["batch_stats", "intermediates"],
        rngs={"dropout": jax.random.key(0)},
    )
    logits, state = jax.eval_shape(apply, variables, image)
    (auxiliary,) = state.get("intermediates", {"auxiliary_logits": [{}]})["auxiliary_logits"]
    return variables, logits, auxiliary


def convolutions(model, size=(8, 12)):
    """The parameters of all convolutions of an evaluation."""
    image = jnp.zeros((1, *size, 3))
    variables, *_ = shapes_of(model, size)
    program = jax.make_jaxpr(functools.partial(model.apply, train=False))(variables, image)
    return [e for e in program.eqns if e.primitive.name == "conv_general_dilated"]


@pytest.mark.parametrize(("stride", "rates"), [(8, (12, 24, 36)), (16, (6, 12, 18))])
def test_aspp_is_dilated_by_a_fixed_number_of_pixels(stride, rates):
    model = make(name="deeplabv3plus", widths=(2,) * stride.bit_length())
    found = {e.params["rhs_dilation"] for e in convolutions(model)} - {(1, 1)}
    assert found == {(rate, rate) for rate in rates}


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_computed_in_bfloat16(name):
    model = make(name=name, dtype="bfloat16", upsampling="bilinear", skips=(1,))
    assert {e.outvars[0].aval.dtype for e in convolutions(model)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("size", [(1, 13), (5, 6)], ids=str)
def test_pooling_averages_over_cells_that_cover_the_map(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    grids = (2, 6)
    for cells, pooled in zip(grids, jax.jit(lambda x: [pool(x, n) for n in grids])(x), strict=True):
        rows, columns = (
            [slice(i * n // cells, -(-(i + 1) * n // cells)) for i in range(cells)] for n in size
        )
        expected = [[x[:, r, c].mean(axis=(1, 2)) for c in columns] for r in rows]
        np.testing.assert_allclose(pooled, np.moveaxis(expected, 2, 0), rtol=1e-5, atol=1e-6)


class TestAuxiliaryHeads:
    FIELDS: ClassVar = {"auxiliary.strides": (2, 4), "auxiliary.weights": (0.5, 0.25)}

    @pytest.mark.parametrize(
        "fields",
        [{}, {"name": "upernet"}, {"name": "fcn"}, {"padding": "VALID"}],
        ids=str,
    )
    def test_their_logits_have_the_labels_of_the_main_logits(self, fields):
        _, logits, auxiliary = shapes_of(make(**fields, **self.FIELDS), (5, 11))
        assert logits.shape == (2, 5, 11, 3)
        assert auxiliary == {2: logits, 4: logits}

    def test_a_level_has_a_linear_head_and_encoder_features_an_fcn_head(self):
        unet, fpn = (shapes_of(make(name=name, **self.FIELDS))[0] for name in ("unet", "fpn"))
        heads = unet["params"]["auxiliary"]
        assert heads.keys() == {"head2", "conv4", "head4"}  # the deepest stride has no level
        assert heads["head2"]["kernel"].shape == (1, 1, 3, 3)
        assert fpn["params"]["auxiliary"].keys() == {"conv2", "head2", "conv4", "head4"}
        assert "auxiliary" in fpn["batch_stats"]

    def test_evaluation_needs_none_of_their_variables(self):
        model = make(name="fpn", **self.FIELDS)
        variables, *_ = shapes_of(model)
        plain, *_ = shapes_of(make(name="fpn"))
        without = {
            name: {part: tree[part] for part in ("encoder", "decoder")}
            for name, tree in variables.items()
        }
        assert without == plain
        jax.eval_shape(functools.partial(model.apply, train=False), plain, jnp.zeros((1, 8, 8, 3)))

    def test_a_frozen_encoder_cannot_be_trained_by_them(self):
        shapes_of(make(freeze_encoder=True, **self.FIELDS | {"auxiliary.strides": (1, 2)}))
        with pytest.raises(ValueError, match=r"strides=\(4,\): with model.freeze_encoder"):
            shapes_of(make(freeze_encoder=True, **self.FIELDS))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_part_in_the_logits(name):
    model = make(name=name, upsampling="transposed_conv", norm="group", skips=(1,))
    variables, *_ = shapes_of(model)
    leaves, tree = jax.tree.flatten(variables)

    def apply(*leaves):
        return model.apply(jax.tree.unflatten(tree, leaves), jnp.zeros((1, 8, 8, 3)), train=False)

    _, used = partial_eval.dce_jaxpr(jax.make_jaxpr(apply)(*leaves).jaxpr, [True])
    assert all(used)


def test_gradients_reach_the_encoder_through_pooling_and_an_auxiliary_head():
    model = make(
        name="upernet",
        widths=(2, 4),
        skips=(),
        upsampling="nearest",
        norm="none",
        **{"auxiliary.strides": (1,), "auxiliary.weights": (1.0,)},
    )
    variables, *_ = shapes_of(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype("f"), variables["params"])
    image = jnp.asarray(rng.normal(size=(2, 8, 12, 3)), jnp.float32)

    def loss(params):
        rngs, mutable = {"dropout": jax.random.key(0)}, ["intermediates"]
        logits, state = model.apply(
            {"params": params}, image, train=True, rngs=rngs, mutable=mutable
        )
        (auxiliary,) = state["intermediates"]["auxiliary_logits"]
        return jnp.mean(logits**2) + jnp.mean(auxiliary[1] ** 2)

    for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.all(np.isfinite(g)) and np.any(g), path
