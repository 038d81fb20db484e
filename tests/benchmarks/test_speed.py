"""Tests that the PyTorch networks in the speed benchmark compute the same functions as ours."""

import functools

import jax
import numpy as np
import pytest

from dense_jax import models

torch = pytest.importorskip("torch", reason="compares with PyTorch where it is installed")


@pytest.mark.parametrize("name", ["unet16", "fcn8s_vgg16", "segnet_basic", "unet_resnet34"])
def test_twins_are_the_same_function_of_as_many_parameters(name):
    from benchmarks import speed, torch_models

    config = speed.MODELS[name][0]().model
    narrow = [max(2, width // 8) for width in config.widths]
    config.widths = tuple(narrow)
    if config.encoder != "plain":
        config.width_multiplier = 1 / 32
    model = models.build(config, 3)
    image = jax.random.normal(jax.random.key(0), (2, 64, 32, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    rng = np.random.default_rng(0)
    fill = lambda x: rng.normal(0, 0.3, x.shape) if x.ndim > 1 else rng.uniform(0.2, 1, x.shape)
    variables = jax.tree.map(lambda x: fill(x).astype("float32"), shapes)
    network = torch_models.Network(model).eval()
    torch_models.load(network, variables)
    with torch.inference_mode():
        theirs = (
            network(torch.from_numpy(np.array(image)).permute(0, 3, 1, 2))
            .permute(0, 2, 3, 1)
            .numpy()
        )
    ours = jax.jit(functools.partial(model.apply, train=False))(variables, image)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())
    learned = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert learned == sum(x.size for x in jax.tree.leaves(variables["params"]))
