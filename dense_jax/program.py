"""A config's network as pure functions from an image to logits, classes or a confusion matrix.

`assemble` builds the model and the steps that use it. Each step takes a single example;
`mesh.map_examples` applies a step to batches. The training steps are in `training.steps`.
"""

import fractions
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num, UInt8
from ml_collections import ConfigDict

from dense_jax import metrics, models
from dense_jax.devices import cpu, mesh
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.layers import resize
from dense_jax.models.normalization import NORMALIZATIONS, to_gray_levels

Variables = Mapping[str, Any]


class Program(NamedTuple):
    """The network of a config.

    model: The model for whole images. Pads an image by mirroring its border.
    inner_model: The same model for images that already include context. If convolutions are
      unpadded, returns no logits for the outer `model.context` pixels.
    normalize: Maps an image's gray levels to the network's input.
    logits_step: (variables, image [h, w, c], levels=None) -> float32 logits [h, w, num_classes].
    predict_step: (variables, image, levels=None) -> the class of each pixel, uint8 [h, w].
    eval_step: (variables, example) -> (counts, maps); see the function `eval_step`.
    context: The number of context pixels that the steps need on each side of a tile.
    """

    model: nn.Module
    inner_model: nn.Module
    normalize: Callable[[Array], Array]
    logits_step: Callable[..., Array]
    predict_step: Callable[..., Array]
    eval_step: Callable[[Any, Mapping[str, Array]], tuple[dict[str, Array], Array | None]]
    context: int

    def variables(self, num_channels: int) -> Variables:
        """Returns the shapes of the model's variables, as jax.ShapeDtypeStructs."""
        return jax.eval_shape(
            functools.partial(self.init, num_channels=num_channels), jax.random.key(0)
        )

    def init(self, key: Array, *, num_channels: int) -> Variables:
        """Returns randomly initialized variables for the model."""
        image = self.normalize(jnp.zeros((1, 64, 64, num_channels), jnp.uint8))
        return self.model.init(key, image, train=False)


def assemble(config: ConfigDict, num_classes: int, temperature: float = 1.0) -> Program:
    """Builds a config's model and the steps that use it. `temperature` is as in `logits_step`.

    Raises ValueError, with the name of the field, if config.model is invalid.
    """
    model = models.build(config.model, num_classes)
    normalize = NORMALIZATIONS[normalization(config.model)]
    resolution = config.data.resolution
    # Unpadded convolutions get real pixels as context. At resolutions other than 1, the context may
    # not be a whole number of pixels. The model then mirrors the border of each tile, and the
    # predictions for the border are discarded.
    inner_model = model.clone(has_context=True)
    logits = functools.partial(
        cpu.fast(logits_step),
        model=inner_model if resolution == 1.0 else model,
        normalize=normalize,
        resolution=resolution,
        temperature=temperature,
    )
    predict = functools.partial(predict_step, logits_step=logits)
    return Program(
        model,
        inner_model,
        normalize,
        logits_step=logits,
        predict_step=predict,
        eval_step=functools.partial(eval_step, predict_step=predict, num_classes=num_classes),
        context=math.ceil(model.context / resolution),
    )


def normalization(model: ConfigDict) -> str:
    """Returns the name of the input normalization.

    If model.normalization is unset, this is the normalization that the pretrained weights require,
    or "unit" if there are none.
    """
    weights = ENCODERS[model.encoder].weights if model.pretrained else None
    return model.normalization or (weights.normalization if weights else "unit")


def logits_step(
    variables: Variables,
    image: Num[Array, "h w c"],
    levels: Float[Array, "2 c"] | None = None,
    *,
    model: nn.Module,
    normalize: Callable[[Array], Array],
    resolution: float = 1.0,
    temperature: float = 1.0,
) -> Float[Array, "h w num_classes"]:
    """Returns the logits of one image, at the image's resolution.

    levels: The values that become gray levels 0 and 255; see `to_gray_levels`.
    resolution: The factor by which the image is resized before it enters the network. The new
      height and width are rounded to integers (halves round up). The logits are resized back.
    temperature: A number by which the logits are divided; see `trained.load`.

    If the model returns logits for only the central part of the image, the other logits are 0.
    """
    (logits,) = batch_logits(
        variables,
        image[None],
        None if levels is None else levels[None],
        model=model,
        normalize=normalize,
        resolution=resolution,
        temperature=temperature,
    )
    return logits


def batch_logits(
    variables: Variables,
    images: Num[Array, "b h w c"],
    levels: Float[Array, "b 2 c"] | None = None,
    *,
    model: nn.Module,
    normalize: Callable[[Array], Array],
    resolution: float = 1.0,
    temperature: float = 1.0,
) -> Float[Array, "b h w num_classes"]:
    """Returns the logits of images of one size; see `logits_step`."""
    _, h, w, _ = images.shape
    if resolution != 1.0:  # before normalization, as in training
        p, q = fractions.Fraction(resolution).limit_denominator(1000).as_integer_ratio()
        size = [jax.core.max_dim(1, (2 * n * p + q) // (2 * q)) for n in (h, w)]
        images = resize(images.astype(jnp.float32), size)
    images = normalize(to_gray_levels(images, levels))
    logits = jnp.asarray(model.apply(variables, images, train=False))
    if resolution != 1.0:
        logits = resize(logits, (h, w))
    if temperature != 1.0:
        logits = logits / temperature
    border = [((n - m) // 2,) * 2 for n, m in zip((h, w), logits.shape[1:3], strict=True)]
    return jnp.pad(logits, [(0, 0), *border, (0, 0)])


def predict_step(
    variables: Variables,
    image: Num[Array, "h w c"],
    levels: Float[Array, "2 c"] | None = None,
    *,
    logits_step: Callable,
) -> UInt8[Array, "h w"]:
    """Returns the most probable class of each pixel of one image."""
    return jnp.argmax(logits_step(variables, image, levels), axis=-1).astype(jnp.uint8)


def eval_step(
    variables: Variables, example: Mapping[str, Array], *, predict_step: Callable, num_classes: int
) -> tuple[dict[str, Array], UInt8[Array, "h w 2"]]:
    """Returns the confusion matrix of one example, and its predicted classes and label.

    The first result is {"index": the example's index, "counts": the confusion matrix}. The second
    result stacks the predicted classes and the label.
    """
    classes = predict_step(variables, example["image"], example.get("levels"))
    counts = metrics.confusion_matrix(classes, example["label"], num_classes)
    maps = jnp.stack([classes, example["label"].astype(jnp.uint8)], axis=-1)
    return {"index": example["index"], "counts": counts}, maps


def jit_eval_step(program: Program, devices: Mesh) -> Any:
    """Returns a jitted eval_step(variables, batch) for batches that are split over the devices.

    Every device, and therefore every host, gets the results of all examples; see `scoring.score`.
    """
    mapped = mesh.map_examples(program.eval_step, devices)
    return jax.jit(mapped, out_shardings=mesh.replicated(devices))
