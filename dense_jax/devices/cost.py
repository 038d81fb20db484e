"""What a program needs, by XLA's own analysis: bytes of each device's memory, FLOPs."""

from collections.abc import Callable
from typing import Any

import jax


def memory(compiled: Any) -> dict[str, int]:
    """The bytes of one device that a compiled program needs.

    `peak` is arguments + outputs + temporaries - aliased: aliased is what outputs take over from
    donated arguments.
    """
    analysis = compiled.memory_analysis()
    parts = {
        name: getattr(analysis, f"{field}_size_in_bytes")
        for name, field in (
            ("arguments", "argument"),
            ("outputs", "output"),
            ("temporaries", "temp"),
            ("aliased", "alias"),
        )
    }
    return parts | {"peak": sum(parts.values()) - 2 * parts["aliased"]}


def flops(function: Callable, *shapes: Any) -> int | None:
    """The floating-point operations of a function before any optimization, wherever it runs.

    A multiply-add is two. Products with the zeros that pad a convolution are left out, and so is what
    is computed on a CPU alone, for speed. None where JAX_PLATFORMS leaves out the CPU: JAX tells
    FLOPs of programs for the CPU alone.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    with jax.default_device(cpu):
        # As for a TPU: a CPU is given more products where that is faster (`models.convolution`).
        lowered: Any = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))
    return int(lowered.cost_analysis().get("flops", 0))  # not there if values are only moved
