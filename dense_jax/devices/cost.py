"""The memory and the FLOPs of a program according to XLA's analysis."""

from collections.abc import Callable
from typing import Any

import jax


def memory(compiled: Any) -> dict[str, int]:
    """Returns the number of bytes that a compiled program needs on each device.

    `peak` is arguments + outputs + temporaries - aliased. `aliased` is the memory of donated
    arguments that is reused for outputs.
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
    """Returns the number of floating-point operations of a function before any optimization.

    A multiply-add counts as two. Products with a convolution's zero padding do not count. The
    number does not depend on the machine. Returns None if JAX_PLATFORMS excludes the CPU, because
    JAX counts FLOPs only for the CPU.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    with jax.default_device(cpu):
        # Lower for a TPU, because on a CPU `cpu.fast` may compute additional products.
        lowered: Any = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))
    return int(lowered.cost_analysis().get("flops", 0))  # absent if the function only moves data
