"""Encoders, selected by `model.encoder`. The base class is `segmenter.Encoder`.

To add an encoder, write its class in a file here and add an entry to ENCODERS.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from dense_jax.models.encoders import alexnet, efficientnet, googlenet, resnet, vgg
from dense_jax.models.encoders.plain import Plain
from dense_jax.models.encoders.resnet import BasicBlock, Bottleneck, ResNet
from dense_jax.models.segmenter import Encoder

TORCHVISION = "code of torchvision, BSD-3-Clause; trained on ImageNet, whose terms may apply"


class Entry(NamedTuple):
    """An encoder and how to load its published weights.

    make: The factory for the encoder, called with the fields of the encoder.
    torch_name: A function of (path, norm) that returns the name of the module at `path` in weight
      files, or None if no weights are published. `norm` is the kind of normalization layer.
    normalization: The name, in NORMALIZATIONS, of the normalization used for pretraining.
    license: A description of the license of the published weights.
    """

    make: Callable[..., Encoder]
    torch_name: Callable[..., str] | None = None
    normalization: str = "unit"
    license: str | None = None


def _resnet(block: type, *depths: int) -> Entry:
    make = functools.partial(ResNet, depths=depths, block=block)
    return Entry(make, resnet.torch_name, "imagenet", TORCHVISION)


ENCODERS: dict[str, Entry] = {
    "plain": Entry(Plain),
    "alexnet": Entry(alexnet.AlexNet, alexnet.torch_name, "imagenet", TORCHVISION),
    "vgg16": Entry(vgg.VGG16, vgg.torch_name, "imagenet", TORCHVISION),
    # GoogLeNet's weights come from another library, so torchvision converts the images.
    "googlenet": Entry(googlenet.GoogLeNet, googlenet.torch_name, "inception", TORCHVISION),
    "resnet18": _resnet(BasicBlock, 2, 2, 2, 2),
    "resnet34": _resnet(BasicBlock, 3, 4, 6, 3),
    "resnet50": _resnet(Bottleneck, 3, 4, 6, 3),
    "efficientnet_lite0": Entry(
        efficientnet.EfficientNetLite0, efficientnet.torch_name, "inception", "Apache-2.0"
    ),
}
