"""Decoders: the `model.name` axis."""

from collections.abc import Callable

from flax import linen as nn

from dense_jax.models.decoders.fcn import FCN
from dense_jax.models.decoders.unet import UNet

DECODERS: dict[str, Callable[..., nn.Module]] = {"fcn": FCN, "unet": UNet}
