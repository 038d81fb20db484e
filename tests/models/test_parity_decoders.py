"""Tests that our decoders compute what those of segmentation_models.pytorch do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import parity, parity_decoders
from dense_jax.models.decoders import DECODERS
from dense_jax.models.pretrained import LEAVES
from dense_jax.models.segmenter import Pyramid
from dense_jax.models.upsampling import UPSAMPLERS


def conv_norm(ours, theirs):
    return {f"{ours}/conv": f"{theirs}.0", f"{ours}/norm": f"{theirs}.1"}


def separable(ours, convs, norm):
    return {
        f"{ours}/depthwise": f"{convs}.0",
        f"{ours}/pointwise/conv": f"{convs}.1",
        f"{ours}/pointwise/norm": norm,
    }


def fpn():
    yield {"lateral32": "p5"}
    yield {f"lateral{s}": f"p{level}.skip_conv" for s, level in ((16, 4), (8, 3), (4, 2))}
    # By stride, the strides that the outputs of the convolutions are upsampled to.
    targets = {32: (16, 8, 4), 16: (8, 4), 8: (4,), 4: (4,)}
    for i, stride in enumerate(targets):
        for k, target in enumerate(targets[stride]):
            yield conv_norm(f"refine{stride}_{target}", f"seg_blocks.{i}.block.{k}.block")


def deeplabv3plus():
    branches = "aspp.0.convs"
    yield conv_norm("aspp/point", f"{branches}.0")
    for i in (1, 2, 3):
        yield separable(f"aspp/atrous{i}", f"{branches}.{i}.0", f"{branches}.{i}.1")
    yield {"aspp/mean/conv": f"{branches}.4.1", "aspp/mean/norm": f"{branches}.4.2"}
    yield conv_norm("aspp/project", "aspp.0.project")
    yield separable("separable", "aspp.1", "aspp.2")
    yield conv_norm("skip4", "block1")
    yield separable("separable4", "block2.0", "block2.1")


def upernet():
    for i, cells in enumerate((1, 2, 3, 6)):
        yield conv_norm(f"pooling/grid{cells}", f"psp.blocks.{i}.1")
    yield conv_norm("pooling/fuse", "psp.out_conv")
    for i, stride in enumerate((4, 8, 16, 32)):
        yield {f"norm{stride}": f"feature_norms.{i}"}
    for i, stride in enumerate((16, 8, 4)):
        yield conv_norm(f"lateral{stride}", f"fpn_lateral_blocks.{i}.conv_norm_relu")
        yield conv_norm(f"refine{stride}", f"fpn_conv_blocks.{i}")
    yield conv_norm("fuse", "fusion_block")


def segformer():
    for i, stride in enumerate((32, 16, 8, 4)):
        yield {f"linear{stride}": f"mlp_stage.{i}.linear"}
    yield conv_norm("fuse", "fuse_stage")


# For each decoder, the options of benchmarks/parity_decoders.py, and the names of their modules by
# ours.
PEERS = {
    "fpn": ({"norm": "group", "decoder_channels": 64}, fpn),
    "deeplabv3plus": ({"decoder_channels": 256, "atrous_rates": (1, 2, 3)}, deeplabv3plus),
    "upernet": ({"decoder_channels": 16}, upernet),
    "segformer": ({"decoder_channels": 16}, segformer),
}


@pytest.mark.parametrize("name", PEERS)
def test_decoders_compute_what_segmentation_models_pytorch_does(name):
    options, modules = PEERS[name]
    names = {"head": "head.0"}
    for pairs in modules():
        names |= {ours: f"decoder.{theirs}" for ours, theirs in pairs.items()}
    features = {s: jnp.asarray(x) for s, x in parity_decoders.features(name).items()}
    make_decoder = DECODERS[name]
    decoder = make_decoder(
        parity_decoders.NUM_CLASSES, UPSAMPLERS["bilinear"], make_decoder.default_skips, **options
    )
    init = functools.partial(decoder.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), Pyramid(features))
    tensors, golden = parity.load(f"decoder_{name}")
    used = set()

    def fill(path, leaf):
        _, *ours, kind = (key.key for key in path)
        module = "/".join(part for part in ours if part not in ("batch", "group"))
        tensor = f"{names[module]}.{LEAVES[kind]}"
        used.add(tensor)
        array = parity.formula(tensor, tensors[tensor])
        if kind == "kernel":
            array = array.reshape(*array.shape[:2], *leaf.shape[:2]).transpose(2, 3, 1, 0)
        assert array.shape == leaf.shape, tensor
        return array

    variables = jax.tree_util.tree_map_with_path(fill, shapes)
    assert used == set(tensors)
    logits, _ = jax.jit(functools.partial(decoder.apply, train=False))(variables, Pyramid(features))
    assert logits.shape == tuple(golden["logits_shape"])
    np.testing.assert_allclose(parity.sample(np.asarray(logits)), golden["logits"], atol=1e-4)
    assert np.std(golden["logits"]) > 0.1
