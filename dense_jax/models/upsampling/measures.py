"""Measures of upsampling methods: evenness, receptive field and memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.models.segmenter import Upsampler


def checkerboard_index(up: Upsampler, *, initial: bool = False) -> float:
    """Returns the relative spread of the values in a cell when a method upsamples a constant map.

    A phase is a pixel position in a cell. The value of a phase is its mean over all cells away from
    the border. The index is the standard deviation over the phases, divided by the mean over the
    phases. Before the division, each of the two is reduced to its root mean square over the
    channels. The index is 0 if all phases are equal, and sqrt(factor^2 - 1) if only one phase is
    not 0. The switches point at every pixel of a window equally often.

    initial: Whether the weights are the initial weights. If False, all kernels are 1 and all biases
      are 0. The index then tells how evenly the taps of the kernels cover the phases.
    """
    border = _border(up)
    cells = 2 * border + 2  # even, because the switches have a period of 2 cells
    x, switches = _inputs(up, cells)

    def value(path: Any, variable: jax.Array) -> jax.Array:
        return jnp.full_like(variable, path[-1].key == "kernel")

    def phases(key: jax.Array, x: jax.Array, switches: jax.Array) -> jax.Array:
        variables = up.init(key, x, switches)
        if not initial:
            variables = jax.tree_util.tree_map_with_path(value, variables)
        y = jnp.asarray(up.apply(variables, x, switches))
        y = y.reshape(cells, up.factor, cells, up.factor, -1)
        return y[border:-border, :, border:-border].mean(axis=(0, 2))

    values = np.asarray(jax.jit(phases)(jax.random.key(0), x, switches), np.float64)
    return float(np.sqrt(values.var(axis=(0, 1)).mean() / (values.mean(axis=(0, 1)) ** 2).mean()))


def receptive_field(up: Upsampler) -> int:
    """Returns the number of adjacent rows of x that the values of one output pixel depend on.

    The result is the largest number over the pixels of a cell. The measurement uses small random
    weights.
    """
    middle = 2 * _border(up)
    rows = np.arange(2 * middle + 1)
    x, switches = _inputs(up, len(rows))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda shape: rng.normal(0, 0.01, shape.shape).astype(shape.dtype),
        jax.eval_shape(up.init, jax.random.key(0), x, switches),
    )
    # One map per row, in which only this row differs from the last map.
    maps = rng.normal(size=x.shape).repeat(len(rows) + 1, axis=0).astype(np.float32)
    maps[rows, rows] += 1
    switches = switches.repeat(len(maps), axis=0)
    y = np.asarray(jax.jit(up.apply)(variables, maps, switches))
    cell = slice(middle * up.factor, (middle + 1) * up.factor)
    reached = (abs(y[:-1] - y[-1:]) > 1e-6)[:, cell, cell].any(axis=3)
    return max(
        int(np.ptp(rows[pixel])) + 1 for pixel in reached.reshape(len(rows), -1).T if pixel.any()
    )


def kept_bytes(up: Upsampler, x: jax.ShapeDtypeStruct, switches: jax.ShapeDtypeStruct) -> int:
    """Returns the size of the arrays that the forward pass keeps for the backward pass, in bytes.

    Parameters do not count. x counts if the backward pass needs it. Counts the arrays of the
    program as traced, before compilation, so the result does not depend on the machine.
    """
    variables = jax.eval_shape(up.init, jax.random.key(0), x, switches)

    def backward(variables: Any, x: jax.Array, switches: jax.Array) -> Any:
        return jax.vjp(lambda variables, x: up.apply(variables, x, switches), variables, x)[1]

    program = jax.make_jaxpr(backward)(variables, x, switches).jaxpr
    parameters = program.invars[: len(jax.tree.leaves(variables))]
    kept = {id(var): var for var in program.outvars if var not in parameters}
    return sum(var.aval.size * var.aval.dtype.itemsize for var in kept.values())


def _border(up: Upsampler) -> int:
    """Returns the largest distance, in cells, at which a map's border can affect the output."""
    return 2 + (getattr(up, "kernel_size", None) or 0) // up.factor


def _inputs(up: Upsampler, cells: int) -> tuple[jax.Array, jax.Array]:
    """Returns a map of ones, [1, cells, cells, features], and switches."""
    x = jnp.ones((1, cells, cells, up.features))
    row, column = np.indices((cells, cells)) % 2
    return x, jnp.broadcast_to((2 * row + column)[None, :, :, None], x.shape)
