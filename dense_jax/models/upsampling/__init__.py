"""Methods for upsampling a feature map, selected by `model.upsampling`.

The base class is `segmenter.Upsampler`. To add a method, write its class in a file here and add the
class to UPSAMPLERS. Decoders, configs and tests then support the method.

The *cell* of an input pixel is the block of factor x factor output pixels at its location.
"""

import functools
from collections.abc import Callable

from dense_jax.models.segmenter import Upsampler
from dense_jax.models.upsampling.carafe import CARAFE
from dense_jax.models.upsampling.convolutions import (
    ResizeConv,
    make_pixel_shuffle,
    make_transposed_conv,
)
from dense_jax.models.upsampling.dysample import DySample
from dense_jax.models.upsampling.fixed import (
    Fixed,
    MaxUnpool,
    bed_of_nails,
    bicubic,
    bilinear,
    repeat,
)

UPSAMPLERS: dict[str, Callable[..., Upsampler]] = {
    "nearest": functools.partial(Fixed, enlarge=repeat),
    "bilinear": functools.partial(Fixed, enlarge=bilinear),
    "bicubic": functools.partial(Fixed, enlarge=bicubic),
    "bed_of_nails": functools.partial(Fixed, enlarge=bed_of_nails),
    "max_unpool": MaxUnpool,
    "transposed_conv": make_transposed_conv,
    "pixel_shuffle": make_pixel_shuffle,
    "resize_conv": ResizeConv,
    "carafe": CARAFE,
    "dysample": DySample,
}
