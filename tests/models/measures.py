"""Measures the receptive field of a network."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from dense_jax.models.segmenter import Segmenter


def receptive_field(
    model: Segmenter, size: tuple[int, int], channels: int = 3
) -> tuple[slice, slice]:
    """Returns the rows and columns of the image that the logits of its center pixel depend on.

    They are the bounding box of the nonzero gradients of pixel (height // 2, width // 2), in
    evaluation.

    size: height and width of the image, pixels; must be larger than the result.

    Raises ValueError if the pixel depends on nothing, or if the box touches the border, so that the
    field may be larger. With group norm it always does: its statistics are those of the whole image.
    """

    def positive(name: str, shape: tuple[int, ...]) -> float:
        # Convolutions that average, so that no ReLU is dead and nothing cancels or overflows.
        return 1 / math.prod(shape[:-1]) if name == "kernel" else float(name != "mean")

    model = model.clone(freeze_encoder=False, has_context=False)
    # A max-pool has a gradient for its winners alone: let them be the first pixels of all windows
    # in one image, and the last in the other.
    row, column = np.indices(size)
    rising = (1 + row + column).astype(np.float32) / sum(size)
    images = np.stack([rising, rising[::-1, ::-1]])[..., None].repeat(channels, axis=-1)
    variables = _constant(_shapes(model, images), positive)
    center = size[0] // 2, size[1] // 2

    def logits(image, variables):
        maps: Any = model.apply(variables, image, train=False)
        return maps[:, *center].sum()

    gradient = jax.jit(jax.grad(logits))(images, variables)
    reached = np.any(np.asarray(gradient), axis=(0, 3))
    box = []
    for axis, length in enumerate(size):
        inside = np.flatnonzero(reached.any(axis=1 - axis))
        if not len(inside):
            raise ValueError(f"the logits of pixel {center} depend on nothing (a bed of nails)")
        first, last = int(inside[0]), int(inside[-1])
        if first == 0 or last == length - 1:
            raise ValueError(
                f"the receptive field of pixel {center} reaches the border of an image of size "
                f"{size}: use a larger one (with group norm it is always the whole image)"
            )
        box.append(slice(first, last + 1))
    return box[0], box[1]


def _shapes(model: nn.Module, image: Any) -> Any:
    """Returns the shapes of the model's variables."""
    return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)


def _constant(variables: Any, value: Callable[[str, tuple[int, ...]], float]) -> Any:
    """Returns variables filled with value(name, shape), such as of the name "kernel"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.full(x.shape, value(path[-1].key, x.shape), x.dtype), variables
    )
