"""Test-time augmentation, which averages class probabilities over transformed copies of an image.

flip: Flips left-right.
flips: Flips left-right, top-bottom and both.
turns: Rotates by 90, 180 and 270 degrees. With a flip, this gives all eight symmetries of a square.
scales: Resizes by the factors in SCALES.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from dense_jax import outputs
from dense_jax.regions import Regions

AUGMENTATIONS = ("flip", "flips", "turns", "scales")
SCALES = (0.75, 1.0, 1.25)


@runtime_checkable
class LogitsStep(Protocol):
    """A function that returns logits (or, with augmentation, probabilities) for one image.

    levels: The image's levels, if images have them; see `data.levels`.
    """

    def __call__(
        self, variables: Any, image: Num[Array, "h w c"], /, *levels: Float[Array, "2 c"]
    ) -> Float[Array, "h w num_classes"]: ...


# A transformation of an array [h, w, ...], and the inverse transformation.
Symmetry = tuple[Callable[[Array], Array], Callable[[Array], Array]]


def _turn(quarters: int) -> Symmetry:
    return (lambda x: jnp.rot90(x, quarters)), (lambda x: jnp.rot90(x, -quarters))


LEFT_RIGHT: Symmetry = (jnp.fliplr, jnp.fliplr)
TOP_BOTTOM: Symmetry = (jnp.flipud, jnp.flipud)
QUARTER, HALF = _turn(1), _turn(2)


def make_probabilities_step(
    logits_step: LogitsStep, augmentations: Sequence[str], regions: Regions | None = None
) -> LogitsStep:
    """Returns probabilities_step(variables, image, *levels), which averages over augmented copies.

    The result is bitwise equivariant under the flips and rotations in `augmentations`: transforming
    the image transforms the result in the same way. Raises ValueError for an unknown augmentation.
    """
    if unknown := sorted(set(augmentations) - set(AUGMENTATIONS)):
        raise ValueError(f"no augmentation {unknown}; there are: {', '.join(AUGMENTATIONS)}")
    scales = SCALES if "scales" in augmentations else (1.0,)
    symmetries = _symmetries(augmentations)

    def probabilities_step(variables: Any, image: Array, /, *levels: Array) -> Array:
        def logits_of(image: Array) -> Array:
            return logits_step(variables, image, *levels)

        def mean_over_scales(image: Array) -> Array:
            terms = [
                outputs.probabilities(_at_scale(logits_of, image, scale), regions)
                for scale in scales
            ]
            return functools.reduce(jnp.add, terms) / len(scales)

        return _mean(mean_over_scales, image, symmetries)

    return probabilities_step


def _symmetries(augmentations: Sequence[str]) -> list[Symmetry]:
    """Returns flips and rotations whose products are all symmetries in `augmentations`."""
    # For every k, the products of the first k generators, each used at most once, form a subgroup.
    turned = "turns" in augmentations
    if "flips" in augmentations or ("flip" in augmentations and turned):
        return [LEFT_RIGHT, TOP_BOTTOM, *([QUARTER] if turned else [])]
    return [HALF, QUARTER] if turned else [LEFT_RIGHT] if "flip" in augmentations else []


def _at_scale(logits_of: Callable[[Array], Array], image: Array, scale: float) -> Array:
    """Returns logits [h, w, num_classes], computed from the image resized by `scale`."""
    h, w, c = image.shape
    if scale != 1.0:
        size = (max(1, round(h * scale)), max(1, round(w * scale)), c)
        resized = jax.image.resize(image.astype(jnp.float32), size, "bilinear", antialias=False)
        is_whole = jnp.issubdtype(image.dtype, jnp.integer)
        image = jnp.round(resized).astype(image.dtype) if is_whole else resized
    logits = logits_of(image)
    if scale != 1.0:
        logits = jax.image.resize(logits, (h, w, logits.shape[-1]), "bilinear")
    return logits


def _mean(
    function: Callable[[Array], Array], image: Array, symmetries: Sequence[Symmetry]
) -> Array:
    """Returns the mean of g^-1(function(g(image))) over all products g of `symmetries`.

    The terms are added in an order that makes the mean bitwise equivariant.
    """
    images = [image]
    for change, _ in reversed(symmetries):
        images = [x for copy in images for x in (copy, change(copy))]
    # All copies of one shape share a program, because two programs may differ in the last bit.
    shapes = dict.fromkeys(x.shape for x in images)  # 90 degree rotations are the second half
    terms: list[Array] = []
    for shape in shapes:
        stacked = jnp.stack([x for x in images if x.shape == shape])
        terms += list(jax.lax.map(function, stacked))
    # Transforming the image permutes the terms, and floating-point addition is commutative but not
    # associative. Terms are therefore added pairwise, over cosets of increasingly large subgroups,
    # so that a transformation can only swap the two summands of a pair.
    for _, undo in symmetries:
        terms = [
            first + undo(second) for first, second in zip(terms[::2], terms[1::2], strict=True)
        ]
    return terms[0] / len(images)
