"""Decoders, selected by `model.name`. The base class is `segmenter.Decoder`.

To add a decoder, write its class in a file here and add the class to DECODERS.
"""

from dense_jax.models.decoders.deeplabv3plus import DeepLabV3Plus
from dense_jax.models.decoders.fcn import FCN
from dense_jax.models.decoders.fpn import FPN
from dense_jax.models.decoders.segformer import SegFormer
from dense_jax.models.decoders.unet import UNet
from dense_jax.models.decoders.upernet import UPerNet
from dense_jax.models.segmenter import Decoder

DECODERS: dict[str, type[Decoder]] = {
    "fcn": FCN,
    "unet": UNet,
    "fpn": FPN,
    "deeplabv3plus": DeepLabV3Plus,
    "upernet": UPerNet,
    "segformer": SegFormer,
}
