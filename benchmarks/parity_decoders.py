"""Writes logits that segmentation_models.pytorch's decoders compute, for CI to compare ours with.

    python -m benchmarks.parity_decoders

writes tests/models/golden/decoder_NAME.npz for each of DECODERS, with `parity.formula` for the weights.
Needs torch and segmentation_models_pytorch, but not JAX. Two settings are changed to ours: all
upsampling is bilinear with half-pixel centers, and a group norm has at most 8 groups.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from benchmarks import parity

NUM_CLASSES = 3
SIZE = (64, 96)  # height and width of the image in pixels
CHANNELS = {4: 8, 8: 12, 16: 16, 32: 20}  # channels of the encoder's features, by stride


class Decoder(NamedTuple):
    """A decoder of segmentation_models.pytorch.

    make: The function that makes it from the numbers of channels of an encoder's features.
    channels: The number of channels that it passes to the head.
    deepest: The largest stride of the encoder's features.
    """

    make: Callable[[Sequence[int]], Any]
    channels: int
    deepest: int = 32


def _fpn(channels: Sequence[int]) -> Any:
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder

    return FPNDecoder(channels, pyramid_channels=64, segmentation_channels=32)


def _deeplabv3plus(channels: Sequence[int]) -> Any:
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder

    return DeepLabV3PlusDecoder(
        channels,
        encoder_depth=5,
        out_channels=256,
        atrous_rates=(1, 2, 3),
        output_stride=16,
        aspp_separable=True,
        aspp_dropout=0.5,
    )


def _upernet(channels: Sequence[int]) -> Any:
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    return UPerNetDecoder(channels, decoder_channels=16)


def _segformer(channels: Sequence[int]) -> Any:
    from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder

    return SegformerDecoder(channels, segmentation_channels=16)


DECODERS = {
    "fpn": Decoder(_fpn, 32),
    "deeplabv3plus": Decoder(_deeplabv3plus, 256, deepest=16),
    "upernet": Decoder(_upernet, 16),
    "segformer": Decoder(_segformer, 16),
}


def features(name: str) -> dict[int, np.ndarray]:
    """Returns the encoder's features for a decoder, [1, h, w, c] between -2 and 2, by stride."""
    return {
        s: 2 * parity.uniform(f"features{s}", (1, *(n // s for n in SIZE), channels))
        for s, channels in CHANNELS.items()
        if s <= DECODERS[name].deepest
    }


def write(name: str) -> None:
    """Writes the golden file of a decoder."""
    import torch
    from segmentation_models_pytorch.base import SegmentationHead
    from torch.nn import functional

    maps = [torch.from_numpy(x.transpose(0, 3, 1, 2)) for x in features(name).values()]
    # The decoders also get the image and, from other encoders, features at stride 2.
    h, w = SIZE
    maps = [torch.zeros(1, 3, h, w), torch.zeros(1, 0, h // 2, w // 2), *maps]
    decoder = DECODERS[name].make([x.shape[1] for x in maps])
    head = SegmentationHead(DECODERS[name].channels, NUM_CLASSES, kernel_size=1, upsampling=4)
    network = torch.nn.ModuleDict({"decoder": decoder, "head": head}).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = math.gcd(8, module.num_channels)
    shapes, interpolate = parity.fill(network), functional.interpolate

    def half_pixel(x, size=None, scale_factor=None, *_, **__):
        return interpolate(x, size, scale_factor, mode="bilinear", align_corners=False)

    with mock.patch.object(functional, "interpolate", half_pixel):
        logits = head(decoder(maps))
    parity.save(f"decoder_{name}", shapes, {"logits": logits.permute(0, 2, 3, 1).numpy()})


if __name__ == "__main__":
    for decoder_name in DECODERS:
        write(decoder_name)
