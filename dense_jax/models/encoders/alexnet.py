"""AlexNet in its one-tower form (Krizhevsky 2014, arXiv 1404.5997), as torchvision has it.

Its paddings leave one row and column less than h/s at every stride s, and center a feature about
half a cell down and right of the middle of its own (1.5, 3.5, 7.5 and 15.5 pixels); fc6's 6x6
window, which reaches one more cell up than down, undoes that to within half a pixel.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dense_jax.models.layers import Classifier, ConvNorm, Pyramid, run, scaled

STAGES = {  # by stride: (name, channels, kernel size, padding in pixels) of the convolutions
    4: (("conv1", 64, 11, 2),),
    8: (("conv2", 192, 5, 2),),
    16: (("conv3", 384, 3, 1), ("conv4", 256, 3, 1), ("conv5", 256, 3, 1)),
}
SMALLEST = 63  # pixels that the last pool needs


class AlexNet(nn.Module):
    """Strides 4 to 32, the last one pool5.

    norm: "none" is the original, without its local response normalization.
    fcn: as FCN uses it: fc6 and fc7 on top of pool5, and features[s] taken behind the pool that
      enters stride s rather than in front of the one that leaves it.
    """

    width_multiplier: float = 1.0
    norm: str = "none"
    fcn: bool = False
    dropout: float = 0.0
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    strides = (4, 8, 16, 32)
    switch_strides = ()

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"], *, train: bool) -> Pyramid:
        _, h, w, _ = image.shape
        missing = [(0, jax.core.max_dim(0, SMALLEST - n)) for n in (h, w)]
        x = jnp.pad(image, ((0, 0), *missing, (0, 0)), mode="edge")
        features = {}
        for stride, convs in STAGES.items():

            def stage(module, x, convs=convs):
                for name, width, kernel_size, padding in convs:
                    x = ConvNorm(
                        scaled(width, self.width_multiplier),
                        kernel_size,
                        stride=4 if name == "conv1" else 1,
                        padding=padding,
                        norm=self.norm,
                        use_bias=True,
                        dtype=self.dtype,
                        name=name,
                    )(x, train=train)
                return x

            entering = x
            x = run(stage, self, x, remat=self.remat)
            features[stride] = entering if self.fcn and stride > 4 else x
            x = nn.max_pool(x, (3, 3), strides=(2, 2))
        features[32] = x
        # The row and column that are missing are copies of the last ones.
        for stride, x in features.items():
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
            features[stride] = x[:, : h // stride, : w // stride]
        if self.fcn:
            classifier = Classifier(
                scaled(4096, self.width_multiplier), 6, self.dropout, self.dtype, name="classifier"
            )
            features[32] = classifier(features[32], train=train)
        else:
            features[32] = nn.Dropout(self.dropout, deterministic=not train)(features[32])
        return Pyramid(features)


def torch_name(path: tuple[str, ...], *, norm: str) -> str:
    """The name in torchvision's alexnet."""
    names = {"conv1": 0, "conv2": 3, "conv3": 6, "conv4": 8, "conv5": 10}
    if path[0] == "classifier":
        return {"fc6": "classifier.1", "fc7": "classifier.4"}[path[1]]
    return f"features.{names[path[0]]}"
