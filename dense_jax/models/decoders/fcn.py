"""The decoder of fully convolutional networks (Long et al. 2015, arXiv 1411.4038)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flax import linen as nn
from jaxtyping import Array

from dense_jax.models.segmenter import Decoder, Pyramid, Spec


class FCN(Decoder):
    """Computes class scores at each fused stride and adds up the scores while upsampling.

    If the deepest features are at stride 32, skips=() gives FCN-32s, skips=(16,) gives FCN-16s
    and skips=(16, 8) gives FCN-8s (section 4.2). 1x1 convolutions compute the scores.

    gradual: Whether to upsample by 2 at a time. If False, each step upsamples to the next fused
      stride, and the last step to stride 1.
    zero_init: Whether all scores start at 0, as in the paper.
    score_scales: The factors that multiply the features of `skips`, in the order of `skips`. The
      factors (0.01, 0.0001) for skips=(16, 8) train FCN-8s in a single stage (arXiv 1605.06211).
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
    def __call__(self, pyramid: Pyramid, *, train: bool) -> tuple[Array, dict[int, Array]]:
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
        return x, {}
