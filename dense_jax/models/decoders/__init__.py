"""Decoders: the `model.name` axis. See `segmenter.Decoder` for what they have in common.

To add a decoder, write its class in a file here and give it a line in DECODERS.
"""

from dense_jax.models.decoders.fcn import FCN
from dense_jax.models.decoders.unet import UNet
from dense_jax.models.segmenter import Decoder

DECODERS: dict[str, type[Decoder]] = {"fcn": FCN, "unet": UNet}
