"""The memory and the FLOPs of a program, by XLA's own analysis."""

from collections.abc import Callable
from typing import Any

import jax


def memory(compiled: Any) -> dict[str, int]:
    """Returns the bytes that a compiled program needs of one device.

    `peak` is arguments + outputs + temporaries - aliased. `aliased` is the memory of donated
    arguments, which outputs reuse.
    """
    analysis = compiled.memory_analysis()
    fields = {
        "arguments": "argument",
        "outputs": "output",
        "temporaries": "temp",
        "aliased": "alias",
    }
    parts = {name: getattr(analysis, f"{f}_size_in_bytes") for name, f in fields.items()}
    return parts | {"peak": sum(parts.values()) - 2 * parts["aliased"]}


def flops(function: Callable, *shapes: Any) -> int | None:
    """Counts the floating-point operations of a function before any optimization, on any machine.

    A multiply-add is two. Products with the zeros that pad a convolution do not count. Returns None
    if JAX_PLATFORMS excludes the CPU, because JAX counts FLOPs for the CPU alone.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    with jax.default_device(cpu):
        # Lowered for a TPU, because on a CPU `cpu.fast` computes more products where that is faster.
        lowered: Any = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))
    return int(lowered.cost_analysis().get("flops", 0))  # absent if values are only moved
