"""Test-time augmentation: the mean of the class probabilities over changed copies of an image.

flip: left-right. flips: left-right, top-bottom and both. turns: by 90, 180 and 270 degrees; with
flips, all eight ways to lay a square on itself. scales: resized by the factors of SCALES.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

AUGMENTATIONS = ("flip", "flips", "turns", "scales")
SCALES = (0.75, 1.0, 1.25)

Symmetry = Callable[[Array], Array]


def _turn(quarters: int) -> tuple[Symmetry, Symmetry]:
    return (lambda x: jnp.rot90(x, quarters)), (lambda x: jnp.rot90(x, -quarters))


# A change of an array [h, w, ...] and what undoes it.
LEFT_RIGHT = (jnp.fliplr, jnp.fliplr)
TOP_BOTTOM = (jnp.flipud, jnp.flipud)
QUARTER, HALF = _turn(1), _turn(2)


def make_probabilities_step(
    logits_step: Callable, augmentations: Sequence[str]
) -> Callable[[Any, UInt8[Array, "h w c"]], Float[Array, "h w num_classes"]]:
    """Returns probabilities_step(variables, image), for one image, from `steps.make_logits_step`'s.

    Where the symmetries of a square image change it, the result changes in the same way, to the
    bit. Raises ValueError for an unknown augmentation.
    """
    if unknown := sorted(set(augmentations) - set(AUGMENTATIONS)):
        raise ValueError(f"no augmentation {unknown}; there are: {', '.join(AUGMENTATIONS)}")
    scales = SCALES if "scales" in augmentations else (1.0,)

    def of_scales(variables: Any, image: Array) -> Array:
        resized = [_resized(logits_step, variables, image, scale) for scale in scales]
        return functools.reduce(jnp.add, resized) / len(scales)

    def probabilities_step(variables: Any, image: Array) -> Array:
        return _mean(lambda x: of_scales(variables, x), image, _symmetries(augmentations))

    return probabilities_step


def _symmetries(augmentations: Sequence[str]) -> list[tuple[Symmetry, Symmetry]]:
    """Generators s1, s2, ...: all products s1^a s2^b ... with powers 0 and 1 are the group.

    So are those of the first ones a group, half as large, at each length.
    """
    turned = "turns" in augmentations
    if "flips" in augmentations or ("flip" in augmentations and turned):
        return [LEFT_RIGHT, TOP_BOTTOM, *([QUARTER] if turned else [])]
    return [HALF, QUARTER] if turned else [LEFT_RIGHT] if "flip" in augmentations else []


def _resized(logits_step: Callable, variables: Any, image: Array, scale: float) -> Array:
    """The softmax at another resolution; the network sees whole gray levels, as always."""
    h, w, c = image.shape
    if scale != 1.0:
        size = (max(1, round(h * scale)), max(1, round(w * scale)), c)
        resized = jax.image.resize(image.astype(jnp.float32), size, "bilinear", antialias=False)
        image = jnp.round(resized).astype(jnp.uint8)
    logits = logits_step(variables, image)
    if scale != 1.0:
        logits = jax.image.resize(logits, (h, w, logits.shape[-1]), "bilinear")
    return jax.nn.softmax(logits)


def _mean(
    function: Callable, image: Array, symmetries: Sequence[tuple[Symmetry, Symmetry]]
) -> Array:
    """mean_g g^-1 function(g image) over the group, in an order that the group does not change.

    Of a changed image, the terms are the same ones, changed, in other places. They are added up
    over the cosets of ever larger subgroups, two sums at a time: that a change of the image can
    only swap, and a + b = b + a in floating point, too, where (a + b) + c = a + (b + c) is not.
    """
    images = [image]
    for change, _ in reversed(symmetries):
        images = [x for each in images for x in (each, change(each))]
    # One program for all of one shape: two programs may differ in the last bit.
    shapes = dict.fromkeys(x.shape for x in images)  # those that were turned are the second half
    terms: list[Array] = []
    for shape in shapes:
        stacked = jnp.stack([x for x in images if x.shape == shape])
        terms += list(jax.lax.map(function, stacked))
    for _, undo in symmetries:
        terms = [
            first + undo(second) for first, second in zip(terms[::2], terms[1::2], strict=True)
        ]
    return terms[0] / len(images)
