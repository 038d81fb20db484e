"""Losses for semantic segmentation, called as `LOSSES[name](logits, labels, **options)`.

All losses are pure functions. logits are floats [b, h, w, c] before the softmax. labels are
integers [b, h, w] in [0, c), c <= 255. The result is a scalar for the whole batch, which is the
global batch under `jit`. Sums are float32, or float64 if the logits are float64.

A pixel is ignored if its label is IGNORE_LABEL or any other number outside [0, c). An ignored pixel
affects neither the loss nor the gradient, even if its logits are NaN. If no pixel is valid, the
loss and the gradient are 0. `class_weights` are c nonnegative numbers. Invalid shapes, types and
options raise ValueError during tracing.

Instead of class ids, labels may be the masks of regions that may overlap, integers [b, h, w, c]
that are 0 or 1. A pixel with any other number is ignored. The probability of a region is then the
sigmoid of its logit, that is, the softmax of (0, logit): each region is a segmentation of two
classes, outside and inside. Losses of the overlap and of boundaries score the inside alone, and
`include_background` has no effect. Losses per pixel are averaged over the regions. `class_weights`
are those of the regions, in these means.

A loss may need a per-pixel field of `data.targets`, which is then a keyword argument without a
default, such as `distances` of `boundary`. Several losses may be added; see `terms`.

In formulas, p is the softmax probability, t the one-hot label, and sums run over valid pixels.
"""

import ast
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dense_jax.losses.overlap import (
    cldice,
    dice_ce,
    generalized_dice,
    lovasz_softmax,
    soft_dice,
    soft_jaccard,
    tversky,
)
from dense_jax.losses.pixelwise import boundary, cross_entropy, focal, with_border_weights
from dense_jax.spelling import suggestion

LOSSES: dict[str, Callable[..., Float[Array, ""]]] = {
    "cross_entropy": cross_entropy,
    "soft_dice": soft_dice,
    "dice_ce": dice_ce,
    "focal": focal,
    "soft_jaccard": soft_jaccard,
    "tversky": tversky,
    "lovasz_softmax": lovasz_softmax,
    "generalized_dice": generalized_dice,
    "cldice": cldice,
    "boundary": boundary,
}


class Term(NamedTuple):
    """A term of a sum of losses: weight * LOSSES[name](logits, labels, **options)."""

    weight: float | int
    name: str
    options: dict[str, Any]

    @property
    def accepted(self) -> tuple[str, ...]:
        """Returns the names of the loss's keyword arguments."""
        return tuple(inspect.signature(LOSSES[self.name]).parameters)[2:]

    @property
    def fields(self) -> tuple[str, ...]:
        """Returns the names of the per-pixel fields that the loss needs."""
        parameters = inspect.signature(LOSSES[self.name]).parameters
        return tuple(n for n in self.accepted if parameters[n].default is inspect.Parameter.empty)


def terms(text: str) -> list[Term]:
    """Returns the terms of a sum, such as "cross_entropy + 3 * tversky(alpha=0.3, beta=0.7)".

    A term is a loss, which a number may precede and whose options may follow. Raises ValueError if
    the text is anything else or names an unknown loss.
    """

    def parse(node: ast.AST) -> list[Term]:
        match node:
            case ast.BinOp(left, ast.Add(), right):
                return parse(left) + parse(right)
            case ast.BinOp(ast.Constant(int() | float() as weight), ast.Mult(), right):
                return [term._replace(weight=weight * term.weight) for term in parse(right)]
            case ast.Name(name):
                return [Term(1, name, {})]
            case ast.Call(ast.Name(name), [], keywords):
                options = {str(k.arg): ast.literal_eval(k.value) for k in keywords}
                if len(options) == len(keywords):
                    return [Term(1, name, options)]
        raise SyntaxError

    try:
        parsed = parse(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError):
        raise ValueError(
            f"loss={text!r} must be a loss, or a sum of losses and their options, such as "
            f"'cross_entropy + 3 * tversky(alpha=0.3)'; the losses are {', '.join(LOSSES)}"
        ) from None
    for _, name, _ in parsed:
        if name not in LOSSES:
            raise ValueError(
                f"loss={name!r} is not one of {', '.join(LOSSES)}{suggestion(name, LOSSES)}"
            )
    return parsed


def total(
    terms: Sequence[Term], options: Mapping[str, Any] = {}, fields: Collection[str] = ()
) -> Callable[..., Float[Array, ""]]:
    """Returns the function (logits, labels, **fields) that computes a sum of losses.

    options: Options of every term whose loss has them, unless the term has a value of its own. None
      stands for the loss's default.
    fields: The names of the per-pixel fields that the function is called with. `border` adds to the
      pixel weights of every term that has pixel weights. A term whose field is missing is left out.
      If no term is left, the sum is NaN.
    """
    parts = []
    for term in terms:
        given = {
            name: value
            for name, value in {**options, **term.options}.items()
            if name in term.accepted and value is not None
        }
        loss, needed = functools.partial(LOSSES[term.name], **given), term.fields
        if "border" in fields and "pixel_weights" in term.accepted:
            loss, needed = with_border_weights(loss, given.get("class_weights")), ("border",)
        if set(needed) <= set(fields):
            parts.append((term.weight, loss, needed))

    def total_loss(logits: ArrayLike, labels: ArrayLike, **values: ArrayLike) -> Float[Array, ""]:
        losses = [
            weight * loss(logits, labels, **{name: values[name] for name in needed})
            for weight, loss, needed in parts
        ]
        return sum(losses[1:], losses[0]) if losses else jnp.full((), jnp.nan)

    return total_loss
