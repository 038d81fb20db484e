"""Fully convolutional network decoder (Long, Shelhamer and Darrell 2015, arXiv 1411.4038)."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dense_jax.devices.cpu import Conv
from dense_jax.models.layers import Pyramid


class FCN(nn.Module):
    """Scores every fused stride with a 1x1 convolution and sums the scores on the way up.

    With the deepest features at stride 32, `skips` () is FCN-32s, (16,) FCN-16s, (16, 8) FCN-8s
    (section 4.2). From one fused stride to the next, and from the last to the input's
    resolution, there is a single upsampling by that factor.

    upsample: makes an upsampler, called with `features` and `factor`.
    gradual: upsamples by 2 each time instead, also from a stride that is not fused.
    zero_init: whether all scores start at 0, as in the paper.
    score_scales: what the features of each of `skips` are multiplied with, in that order. With
      (0.01, 0.0001) for (16, 8), FCN-8s trains at once rather than in stages (arXiv 1605.06211).
    """

    num_classes: int
    upsample: Callable[..., nn.Module]
    skips: Sequence[int]
    gradual: bool = False
    zero_init: bool = False
    score_scales: Sequence[float] | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pyramid: Pyramid, *, train: bool) -> Float[Array, "b h w num_classes"]:
        init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        scales = dict(zip(self.skips, self.score_scales or [1] * len(self.skips), strict=True))

        def score(stride):
            head = Conv(
                self.num_classes,
                (1, 1),
                kernel_init=init,
                dtype=self.dtype,
                name=f"score{stride}",
            )
            return head(scales.get(stride, 1) * pyramid.features[stride])

        def enlarge(x, stride, target):
            factor, name = stride // target, f"up{target}"
            return self.upsample(features=self.num_classes, factor=factor, name=name)(x)

        stride = max(pyramid.features)
        x = score(stride)
        while stride > 1:
            below = max((s for s in self.skips if s < stride), default=1)
            if self.gradual:
                below = stride // 2
            x = enlarge(x, stride, below)
            if below in self.skips:
                x = x + score(below)
            stride = below
        return x
