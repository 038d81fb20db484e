"""VGG16 (Simonyan and Zisserman 2015, arXiv 1409.1556, table 1, column D)."""

from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.layers import Classifier, max_pool, scaled
from dense_jax.models.segmenter import Encoder, Pyramid, Spec

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, number of 3x3 convolutions


class VGG16(Encoder):
    """The VGG16 encoder, with features at strides 1, 2, 4, 8, 16 and 32 (pool5).

    norm: "none" gives the original network, and "batch" gives torchvision's vgg16_bn.
    classifier: Whether to append fc6 and fc7 after pool5, implemented as convolutions.
    taps: Which map becomes features[s]. "before_pool" selects the last map at stride s.
      "after_pool" selects the output of the max-pool that leads to stride s, as in FCN (pool3 and
      pool4).
    """

    norm: str = "none"
    width_multiplier: float = 1.0
    classifier: bool = False
    taps: str = "before_pool"

    @property
    def spec(self) -> Spec:
        strides = (1, 2, 4, 8, 16, 32)
        return Spec(strides, strides[:-1] if self.taps == "before_pool" else ())

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"], *, train: bool) -> Pyramid:
        features, switches = {}, {}
        x = image
        for number, (width, num_convs) in enumerate(STAGES, 1):
            channels = scaled(width, self.width_multiplier)
            # There is a bias even before a norm, as in the published weights.
            convs = [
                self.conv(channels, use_bias=True, name=f"conv{number}_{i}")
                for i in range(1, num_convs + 1)
            ]
            stride, entering = 2 ** (number - 1), x
            x = self.stage(*convs)(x, train)
            is_pooled = self.taps == "after_pool" and stride > 1
            features[stride] = entering if is_pooled else x
            x, winners = max_pool(x)
            if stride in self.spec.switch_strides:
                switches[stride] = winners
        if self.classifier:
            width = scaled(4096, self.width_multiplier)
            x = Classifier(width, 7, self.dropout, self.dtype, name="classifier")(x, train=train)
        else:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        features[32] = x
        return Pyramid(features, switches)


def torch_name(path: tuple[str, ...], *, norm: str) -> str:
    """Returns the name of the module at `path` in torchvision's vgg16 (norm "none") or vgg16_bn."""
    if path[0] == "classifier":
        return {"fc6": "classifier.0", "fc7": "classifier.3"}[path[1]]
    number, i = map(int, path[0].removeprefix("conv").split("_"))
    before = sum(num_convs for _, num_convs in STAGES[: number - 1]) + i - 1
    per_conv = 2 if norm == "none" else 3  # convolution, [norm,] ReLU
    return f"features.{per_conv * before + number - 1 + (path[1] == 'norm')}"
