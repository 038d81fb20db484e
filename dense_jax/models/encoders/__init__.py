"""Encoders: the `model.encoder` axis.

Every encoder is a Module called `encoder(image, train=...)` with image [b, h, w, c], h and w
multiples of its deepest stride, and returns a `layers.Pyramid`. It is made with
  norm      "batch" | "group" | "none"
  dropout   probability that a value of the deepest features is dropped (after fc6 and after fc7,
            where there are these)
  remat     whether each stage's activations are computed again for the gradient, not kept
  dtype     of the computation
and with `width_multiplier`, of all its channels, if its widths are published ones. It has
  strides         those of its features, in increasing order
  switch_strides  those with a 2x2 max-pool behind them
One that FCN's paper uses with its classifier has `fcn`, which says to do so. A file whose weights
`pretrained` can read has torch_name(path, norm=...) -> str, torchvision's name of the module at a
path; `pretrained` lists it. To add an encoder, write a file here and a line in ENCODERS.
"""

import functools
from collections.abc import Callable

from flax import linen as nn

from dense_jax.models.encoders.alexnet import AlexNet
from dense_jax.models.encoders.googlenet import GoogLeNet
from dense_jax.models.encoders.plain import Plain
from dense_jax.models.encoders.resnet import BasicBlock, Bottleneck, ResNet
from dense_jax.models.encoders.vgg import VGG16

ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "plain": Plain,
    "alexnet": AlexNet,
    "vgg16": VGG16,
    "googlenet": GoogLeNet,
    "resnet18": functools.partial(ResNet, depths=(2, 2, 2, 2), block=BasicBlock),
    "resnet34": functools.partial(ResNet, depths=(3, 4, 6, 3), block=BasicBlock),
    "resnet50": functools.partial(ResNet, depths=(3, 4, 6, 3), block=Bottleneck),
}
