"""VGG16 (Simonyan and Zisserman 2015, arXiv 1409.1556, table 1, column D)."""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dense_jax.models.layers import Classifier, ConvNorm, Pyramid, max_pool, run, scaled

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, 3x3 convolutions


class VGG16(nn.Module):
    """Strides 1 to 32, the last one pool5.

    norm: "none" is the original, "batch" torchvision's vgg16_bn.
    fcn: as FCN uses it: fc6 and fc7 on top of pool5, and features[s] taken behind the pool that
      enters stride s (its pool3, pool4) rather than in front of the one that leaves it.
    """

    width_multiplier: float = 1.0
    norm: str = "none"
    fcn: bool = False
    dropout: float = 0.0
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    strides = (1, 2, 4, 8, 16, 32)

    @property
    def switch_strides(self) -> tuple[int, ...]:
        return () if self.fcn else self.strides[:-1]

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"], *, train: bool) -> Pyramid:
        features, switches = {}, {}
        x = image
        for number, (width, num_convs) in enumerate(STAGES, 1):

            def stage(module, x, number=number, width=width, num_convs=num_convs):
                for i in range(1, num_convs + 1):
                    x = ConvNorm(
                        scaled(width, self.width_multiplier),
                        norm=self.norm,
                        use_bias=True,  # also in front of a norm, as in the published weights
                        dtype=self.dtype,
                        name=f"conv{number}_{i}",
                    )(x, train=train)
                return x

            stride, entering = self.strides[number - 1], x
            x = run(stage, self, x, remat=self.remat)
            features[stride] = entering if self.fcn and stride > 1 else x
            x, won = max_pool(x)
            if stride in self.switch_strides:
                switches[stride] = won
        if self.fcn:
            width = scaled(4096, self.width_multiplier)
            x = Classifier(width, 7, self.dropout, self.dtype, name="classifier")(x, train=train)
        else:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        features[32] = x
        return Pyramid(features, switches)


def torch_name(path: tuple[str, ...], *, norm: str) -> str:
    """The name in torchvision's vgg16 (norm "none") and vgg16_bn."""
    if path[0] == "classifier":
        return {"fc6": "classifier.0", "fc7": "classifier.3"}[path[1]]
    number, i = map(int, path[0].removeprefix("conv").split("_"))
    before = sum(num_convs for _, num_convs in STAGES[: number - 1]) + i - 1
    per_conv = 2 if norm == "none" else 3  # convolution, [norm,] ReLU
    return f"features.{per_conv * before + number - 1 + (path[1] == 'norm')}"
