"""AlexNet in its one-tower form (Krizhevsky 2014, arXiv 1404.5997), as in torchvision.

A feature vector at stride s represents a cell of s x s image pixels. Its receptive field is
centered on the cell's bottom-right pixel. fc6 moves the receptive field up and left by half a cell,
because its 6x6 window extends one cell farther up and left than down and right. The remaining
offset from the cell's center is half a pixel.

torchvision's padding yields no features for the last row and column of cells. The encoder repeats
the features of the neighboring cells there.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dense_jax.models.layers import Classifier, scaled
from dense_jax.models.segmenter import Encoder, Pyramid, Spec

STAGES = {  # by stride: (name, channels, kernel size, padding in pixels) of each convolution
    4: (("conv1", 64, 11, 2),),
    8: (("conv2", 192, 5, 2),),
    16: (("conv3", 384, 3, 1), ("conv4", 256, 3, 1), ("conv5", 256, 3, 1)),
}
SMALLEST = 63  # height and width that the last pool needs, in pixels


class AlexNet(Encoder):
    """The AlexNet encoder, with features at strides 4, 8, 16 and 32 (pool5).

    norm: "none" gives the original network without its local response normalization.
    classifier: Whether to append fc6 and fc7 after pool5, implemented as convolutions.
    taps: Which map becomes features[s]. "before_pool" selects the last map at stride s.
      "after_pool" selects the output of the max-pool that leads to stride s, as in FCN.
    """

    norm: str = "none"
    width_multiplier: float = 1.0
    classifier: bool = False
    taps: str = "before_pool"

    @property
    def spec(self) -> Spec:
        return Spec((4, 8, 16, 32))

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"], *, train: bool) -> Pyramid:
        _, h, w, _ = image.shape
        missing = [(0, jax.core.max_dim(0, SMALLEST - n)) for n in (h, w)]
        x = jnp.pad(image, ((0, 0), *missing, (0, 0)), mode="edge")
        features = {}
        for stride, layers in STAGES.items():
            convs = [
                self.conv(
                    scaled(width, self.width_multiplier),
                    kernel_size,
                    stride=4 if name == "conv1" else 1,
                    padding=padding,
                    use_bias=True,
                    name=name,
                )
                for name, width, kernel_size, padding in layers
            ]
            entering = x
            x = self.stage(*convs)(x, train)
            is_pooled = self.taps == "after_pool" and stride > 4
            features[stride] = entering if is_pooled else x
            x = nn.max_pool(x, (3, 3), strides=(2, 2))
        features[32] = x
        # Adds copies of the last row and column for the cells without a feature.
        for stride, x in features.items():
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
            features[stride] = x[:, : h // stride, : w // stride]
        if self.classifier:
            width = scaled(4096, self.width_multiplier)
            classifier = Classifier(width, 6, self.dropout, self.dtype, name="classifier")
            features[32] = classifier(features[32], train=train)
        else:
            features[32] = nn.Dropout(self.dropout, deterministic=not train)(features[32])
        return Pyramid(features)


def torch_name(path: tuple[str, ...], *, norm: str) -> str:
    """Returns the name of the module at `path` in torchvision's alexnet."""
    names = {"conv1": 0, "conv2": 3, "conv3": 6, "conv4": 8, "conv5": 10}
    if path[0] == "classifier":
        return {"fc6": "classifier.1", "fc7": "classifier.4"}[path[1]]
    return f"features.{names[path[0]]}"
