"""Tests that encoders load the tensors of PyTorch's libraries and compute the same features.

`benchmarks.parity` writes the golden files. CI compares the features of one network for each kind of
encoder. Set DENSE_JAX_PARITY=all to compare all of them.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import parity
from dense_jax.models import pretrained
from dense_jax.models.encoders import ENCODERS

OPTIONS = {
    "alexnet_fcn": {"classifier": True, "taps": "after_pool"},
    "vgg16_bn": {"norm": "batch"},
    "resnet18_dilated": {"output_stride": 8},
    "mobilenet_v3_large_dilated": {"output_stride": 8},
}
COMPARED = (
    *("alexnet_fcn", "vgg16_bn", "googlenet", "resnet18_dilated", "resnet50"),
    *("mobilenet_v3_large", "efficientnet_lite0", "convnext_tiny", "mit_b0"),
)


def zeros(tensor, shape):
    return np.broadcast_to(np.float32(0), shape)


def load(network, weight):
    """The encoder, with weight(name, shape) for all names and shapes in the golden file."""
    name = max((name for name in ENCODERS if network.startswith(name)), key=len)
    encoder = ENCODERS[name].make(**OPTIONS.get(network, {}))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, train=False), image)
    # The fully connected layers, which the encoder may leave out, are larger than all the others.
    is_left_out = not getattr(encoder, "classifier", True)
    tensors = {
        tensor: (zeros if is_left_out and "classifier" in tensor else weight)(tensor, shape)
        for tensor, shape in parity.load(network)[0].items()
    }
    return encoder, pretrained.convert(tensors, network, name, encoder.norm, shapes)


@pytest.mark.parametrize("network", [n for n in parity.NETWORKS if n not in COMPARED])
def test_the_names_and_shapes_of_all_tensors_are_the_librarys(network):
    load(network, zeros)


@pytest.mark.parametrize(
    "network", parity.NETWORKS if os.environ.get("DENSE_JAX_PARITY") == "all" else COMPARED
)
def test_names_shapes_and_features_are_the_librarys(network):
    encoder, variables = load(network, parity.formula)
    apply = jax.jit(functools.partial(encoder.apply, train=False))
    features = apply(variables, parity.image(network)).features
    _, expected = parity.load(network)
    assert features.keys() == {int(key) for key in expected if key.isdecimal()}
    for stride, x in features.items():
        theirs, (_, h, w, _) = expected[f"{stride}"], expected[f"{stride}_shape"]
        # The library's classifier has an output for the pixel in the middle alone.
        top, left = (n // 2 if (h, w) == (1, 1) else 0 for n in x.shape[1:3])
        ours = parity.sample(np.asarray(x)[:, top : top + h, left : left + w])
        np.testing.assert_allclose(ours / theirs.std(), theirs / theirs.std(), atol=1e-4, rtol=0)


def test_every_encoder_with_published_weights_has_a_golden_file():
    assert {name for name, entry in ENCODERS.items() if entry.weights} <= parity.NETWORKS.keys()
