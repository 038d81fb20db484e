"""Test-time augmentation: the mean of the class probabilities over changed copies of an image.

flip: left-right. flips: left-right, top-bottom and both. turns: by 90, 180 and 270 degrees; with
flips, all eight symmetries of a square. scales: resized by the factors of SCALES.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

AUGMENTATIONS = ("flip", "flips", "turns", "scales")
SCALES = (0.75, 1.0, 1.25)


@runtime_checkable
class LogitsStep(Protocol):
    """A network, for one image. Under augmentation it returns probabilities."""

    def __call__(
        self, variables: Any, image: UInt8[Array, "h w c"], /
    ) -> Float[Array, "h w num_classes"]: ...


# A change of an array [h, w, ...], and what undoes it.
Symmetry = tuple[Callable[[Array], Array], Callable[[Array], Array]]


def _turn(quarters: int) -> Symmetry:
    return (lambda x: jnp.rot90(x, quarters)), (lambda x: jnp.rot90(x, -quarters))


LEFT_RIGHT: Symmetry = (jnp.fliplr, jnp.fliplr)
TOP_BOTTOM: Symmetry = (jnp.flipud, jnp.flipud)
QUARTER, HALF = _turn(1), _turn(2)


def make_probabilities_step(logits_step: LogitsStep, augmentations: Sequence[str]) -> LogitsStep:
    """Returns probabilities_step(variables, image), for one image.

    Where the symmetries of a square change the image, the result changes in the same way, bitwise.
    Raises ValueError for an unknown augmentation.
    """
    if unknown := sorted(set(augmentations) - set(AUGMENTATIONS)):
        raise ValueError(f"no augmentation {unknown}; there are: {', '.join(AUGMENTATIONS)}")
    scales = SCALES if "scales" in augmentations else (1.0,)
    symmetries = _symmetries(augmentations)

    def probabilities_step(variables: Any, image: Array) -> Array:
        def mean_over_scales(image: Array) -> Array:
            terms = [_at_scale(logits_step, variables, image, scale) for scale in scales]
            return functools.reduce(jnp.add, terms) / len(scales)

        return _mean(mean_over_scales, image, symmetries)

    return probabilities_step


def _symmetries(augmentations: Sequence[str]) -> list[Symmetry]:
    """Returns generators s1, s2, ...: the products s1^a s2^b ... with powers 0 and 1 are the group.

    For every k, the products of the first k generators are a group, too.
    """
    turned = "turns" in augmentations
    if "flips" in augmentations or ("flip" in augmentations and turned):
        return [LEFT_RIGHT, TOP_BOTTOM, *([QUARTER] if turned else [])]
    return [HALF, QUARTER] if turned else [LEFT_RIGHT] if "flip" in augmentations else []


def _at_scale(logits_step: LogitsStep, variables: Any, image: Array, scale: float) -> Array:
    """Returns the softmax at another resolution; the network sees whole gray levels, as always."""
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
    function: Callable[[Array], Array], image: Array, symmetries: Sequence[Symmetry]
) -> Array:
    """Returns the mean of g^-1 function(g image) over the group, in an order that respects it.

    A changed image has the same terms, changed and in another order. They are added over the cosets
    of ever larger subgroups, two sums at a time. A change of the image can only swap the two, and
    a + b = b + a holds in floating point, while (a + b) + c = a + (b + c) does not.
    """
    images = [image]
    for change, _ in reversed(symmetries):
        images = [x for copy in images for x in (copy, change(copy))]
    # One program for all copies of one shape, because two programs may differ in the last bit.
    shapes = dict.fromkeys(x.shape for x in images)  # turned copies are the second half
    terms: list[Array] = []
    for shape in shapes:
        stacked = jnp.stack([x for x in images if x.shape == shape])
        terms += list(jax.lax.map(function, stacked))
    for _, undo in symmetries:
        terms = [
            first + undo(second) for first, second in zip(terms[::2], terms[1::2], strict=True)
        ]
    return terms[0] / len(images)
