"""The decoder of fully convolutional networks (Long et al. 2015, arXiv 1411.4038)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.segmenter import Decoder, Pyramid, Spec


class FCN(Decoder):
    """Scores every fused stride with a 1x1 convolution and adds up the scores on the way up.

    With the deepest features at stride 32, `skips` () is FCN-32s, (16,) FCN-16s and (16, 8) FCN-8s
    (section 4.2). From one fused stride to the next, and from the last one to the input's
    resolution, there is a single upsampling by that factor.

    gradual: whether to upsample by 2 each time instead, also from a stride that is not fused.
    zero_init: whether all scores start at 0, as in the paper.
    score_scales: the factors of the features of `skips`, in their order. With (0.01, 0.0001) for
      (16, 8), FCN-8s trains at once instead of in stages (arXiv 1605.06211).
    """

    gradual: bool = False
    zero_init: bool = False
    score_scales: Sequence[float] | None = None

    encoder_options: ClassVar[Mapping[str, Any]] = {"classifier": True, "taps": "after_pool"}

    @nn.nowrap
    def check(self, spec: Spec) -> None:
        super().check(spec)
        if self.score_scales is not None and len(self.score_scales) != len(self.skips):
            raise ValueError(
                f"model.score_scales={self.score_scales} must be one for each of "
                f"model.skips={self.skips}"
            )

    @nn.compact
    def __call__(self, pyramid: Pyramid, *, train: bool) -> Float[Array, "b h w num_classes"]:
        init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        scales = dict(zip(self.skips, self.score_scales or [1] * len(self.skips), strict=True))

        def score(stride):
            head = nn.Conv(
                self.num_classes,
                (1, 1),
                kernel_init=init,
                dtype=self.dtype,
                name=f"score{stride}",
            )
            return head(scales.get(stride, 1) * pyramid.features[stride])

        stride = max(pyramid.features)
        x = score(stride)
        while stride > 1:
            below = max((s for s in self.skips if s < stride), default=1)
            if self.gradual:
                below = stride // 2
            up = self.upsample(features=self.num_classes, factor=stride // below, name=f"up{below}")
            x = up(x)
            if below in self.skips:
                x = x + score(below)
            stride = below
        return x
