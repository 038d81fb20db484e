import inspect
import itertools
from collections.abc import Callable

from dense_jax.models.decoders import DECODERS
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.upsampling import UPSAMPLERS

# One encoder for each kind. The others differ from it in depth or width only.
FAMILIES = [
    name
    for name in ENCODERS
    if name not in ("resnet34", "resnet101", "convnext_small", "mit_b1", "mit_b2")
]
# Networks in which every encoder, decoder and upsampling method occurs.
COVERING = [
    *zip(
        ENCODERS,
        itertools.cycle(DECODERS),
        itertools.cycle(method for method in UPSAMPLERS if method != "max_unpool"),
        strict=False,
    ),
    ("vgg16", "unet", "max_unpool"),
]


def has(part: Callable, option: str) -> bool:
    """Whether an encoder or a decoder has an option."""
    return option in inspect.signature(part).parameters
