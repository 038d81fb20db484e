"""The base class of encoders whose deepest stages may have dilation instead of strides."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.layers import ConvNorm
from dense_jax.models.segmenter import Encoder, Pyramid, Spec


class DilatedEncoder(Encoder, kw_only=True):
    """An encoder with features at strides 2, 4, 8 and so on, up to `output_stride`.

    output_stride: The deepest stride, 8, 16 or 32. A layer that would lead to a larger stride gets
      stride 1, and the layers after it are dilated. Published weights then compute the same
      features at more pixels (arXiv 1606.00915, section 3.1). `features[output_stride]` is the
      output of the last stage.
    """

    width_multiplier: float = 1.0
    output_stride: int = 32

    @property
    def spec(self) -> Spec:
        return Spec(tuple(s for s in (2, 4, 8, 16, 32) if s <= self.output_stride))

    @nn.nowrap
    def conv_between(self, entering: int, leaving: int, **options: Any) -> Callable[..., ConvNorm]:
        """Returns a factory for ConvNorms from stride `entering` to stride `leaving`.

        Both are strides of the published network, which has no dilation. The ConvNorms have the
        stride and the dilation that `output_stride` requires. The factory is called as
        factory(features, kernel_size, **options).
        """
        stride = min(leaving, self.output_stride) // min(entering, self.output_stride)
        dilation = max(1, entering // self.output_stride)

        def make(features: int, kernel_size: int, **others: Any) -> ConvNorm:
            fields = {"padding": dilation * (kernel_size // 2)} | options | others
            return self.conv(features, kernel_size, stride=stride, dilation=dilation, **fields)

        return make

    @nn.nowrap
    def apply_stages(
        self, stages: Mapping[int, Sequence[nn.Module]], image: Float[Array, "b h w c"], train: bool
    ) -> Pyramid:
        """Applies `stages`, {published stride: layers}, to an image. Returns all feature maps."""
        x, features = image, {}
        for stride, layers in stages.items():
            x = features[min(stride, self.output_stride)] = self.stage(*layers)(x, train)
        features[self.output_stride] = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Pyramid(features)
