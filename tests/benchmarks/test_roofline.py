"""Tests that benchmarks.roofline covers all layers of a network, and computes their fractions."""

import jax
import pytest
from flax import linen as nn

from benchmarks import roofline
from dense_jax import models
from dense_jax.devices import cost
from experiments import base

IMAGE = jax.ShapeDtypeStruct((4, 16, 16, 3), "float32")


@pytest.fixture(scope="module")
def model():
    config = base.get_config().model
    config.widths = (8, 12)
    return models.build(config, num_classes=3)


def test_layers_have_the_networks_parameters_and_most_of_its_flops(model):
    def num_parameters(module, x):
        shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))

    found = roofline.layers_of(model, IMAGE)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), IMAGE)
    expected = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sum(count * num_parameters(each.module, each.x) for each, count in found) == expected
    assert [each.is_first for each, _ in found] == [True] + [False] * (len(found) - 1)
    whole = cost.flops(lambda v, x: model.apply(v, x, train=False), variables, IMAGE)
    parts = sum(count * roofline.calls(each)[1]["forward"][0] for each, count in found)
    assert 0.8 * whole < parts < 1.1 * whole


class Chain(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        for _ in range(3):
            x = nn.Conv(4, (3, 3), use_bias=False)(x)
        return x


def test_fractions_are_of_the_longer_of_products_and_moves():
    """Every pass takes a second; its FLOPs half of one, or its bytes a quarter."""
    x = jax.ShapeDtypeStruct((4, 8, 8, 4), "float32")
    flops = 4 * 2 * (3 * 8 - 2) ** 2 * 4 * 4  # rows and columns of the padding are not multiplied
    moved = 4 * (4 * 2 * 8 * 8 * 4 + 9 * 4 * 4)

    def rows(product_rate, copy_rate):
        timed = lambda calls: dict.fromkeys(calls, 1.0)
        return roofline.rows(Chain(), x, timed, product_rate, copy_rate)

    first, others, total = rows(2 * flops, 1e12)
    name = "Conv 3x3, 4 to 4"
    assert first == [name, "4 x 8²", "1", "products", "1000.00", "50 %", "1000.00", "100 %"]
    assert others == [name, "4 x 8²", "2", "products", "1000.00", "50 %", "1000.00", "150 %"]
    assert total[4:] == ["3000", "50 %", "3000", "133 %"]
    first, _, total = rows(1e12, 4 * moved)
    assert first[3:6] == ["memory", "1000.00", "25 %"]
