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
from jaxtyping import Array, Float, Int32, Num, UInt8
from ml_collections import ConfigDict

from dense_jax import metrics, models, outputs
from dense_jax.devices import cpu, mesh
from dense_jax.models.encoders import ENCODERS
from dense_jax.models.layers import resize
from dense_jax.models.normalization import NORMALIZATIONS, to_gray_levels
from dense_jax.regions import Regions

Variables = Mapping[str, Any]


class Program(NamedTuple):
    """The network of a config.

    model: The model for whole images. Pads an image by mirroring its border.
    inner_model: The same model for images that already include context. If convolutions are
      unpadded, returns no logits for the outer `model.context` pixels.
    normalize: Maps an image's gray levels to the network's input.
    logits_step: (variables, image [h, w, c], levels=None) -> float32 logits [h, w, num_classes].
    predict_step: (variables, image, levels=None) -> the class of each pixel, uint8 [h, w]. With
      regions, there is a logit for each, and the result is their masks, uint8 [h, w, r].
    eval_step: (variables, example) -> (counts, maps); see the function `eval_step`.
    context: The number of context pixels that the steps need on each side of a tile.
    num_classes: The number of classes of the labels.
    regions: The regions that the network learns instead of the classes, or None.
    """

    model: nn.Module
    inner_model: nn.Module
    normalize: Callable[[Array], Array]
    logits_step: Callable[..., Array]
    predict_step: Callable[..., Array]
    eval_step: Callable[[Any, Mapping[str, Array]], tuple[dict[str, Array], Any]]
    context: int
    num_classes: int
    regions: Regions | None

    def variables(self, num_channels: int) -> Variables:
        """Returns the shapes of the model's variables, as jax.ShapeDtypeStructs."""
        return jax.eval_shape(
            functools.partial(self.init, num_channels=num_channels), jax.random.key(0)
        )

    def init(self, key: Array, *, num_channels: int) -> Variables:
        """Returns randomly initialized variables for the model."""
        image = self.normalize(jnp.zeros((1, 64, 64, num_channels), jnp.uint8))
        return self.model.init(key, image, train=False)


def assemble(
    config: ConfigDict, num_classes: int, temperature: float = 1.0, regions: Regions | None = None
) -> Program:
    """Builds a config's model and the steps that use it. `temperature` is as in `logits_step`.

    regions: What the network has a logit for, instead of the classes.

    Raises ValueError, with the name of the field, if config.model is invalid.
    """
    model = models.build(config.model, len(regions.names) if regions else num_classes)
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
    predict = functools.partial(predict_step, logits_step=logits, regions=regions)
    eval_of_predict = functools.partial(
        eval_step, predict_step=predict, num_classes=num_classes, regions=regions
    )
    return Program(
        model,
        inner_model,
        normalize,
        logits_step=logits,
        predict_step=predict,
        eval_step=eval_of_predict,
        context=math.ceil(model.context / resolution),
        num_classes=num_classes,
        regions=regions,
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
    regions: Regions | None = None,
) -> UInt8[Array, "..."]:
    """Returns the most probable class of each pixel of one image, or the masks of the regions."""
    return outputs.decide(logits_step(variables, image, levels), regions)


def eval_step(
    variables: Variables,
    example: Mapping[str, Array],
    *,
    predict_step: Callable,
    num_classes: int,
    regions: Regions | None = None,
) -> tuple[dict[str, Array], dict[str, UInt8[Array, "..."]]]:
    """Returns the confusion matrix of one example, and its predicted classes and label.

    The first result is {"index": the example's index, "counts": see `count`}. The second is
    {"classes": the result of `predict_step`, "label": class ids [h, w]}.
    """
    classes = predict_step(variables, example["image"], example.get("levels"))
    counts = count(classes, example["label"], num_classes, regions)
    maps = {"classes": classes, "label": example["label"].astype(jnp.uint8)}
    return {"index": example["index"], "counts": counts}, maps


def count(
    classes: UInt8[Array, "..."], label: Array, num_classes: int, regions: Regions | None
) -> Int32[Array, "*r c c"]:
    """Returns the confusion matrix of classes [h, w], or one of 2 x 2 for each region's mask."""
    if regions is None:
        return metrics.confusion_matrix(classes, label, num_classes)
    return metrics.region_matrices(classes, outputs.targets(label, regions))


def jit_eval_step(program: Program, devices: Mesh) -> Any:
    """Returns a jitted eval_step(variables, batch) for batches that are split over the devices.

    Every device, and therefore every host, gets the results of all examples; see `scoring.score`.
    """
    mapped = mesh.map_examples(program.eval_step, devices)
    return jax.jit(mapped, out_shardings=mesh.replicated(devices))
