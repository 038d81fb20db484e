"""Compiles programs for TPUs that this machine does not have, and reads the compiler's estimates.

The compiler is in the package libtpu, which `pip install "jax[tpu]"` installs. No TPU is needed.
"""

import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

# The clock rate of a TensorCore in Hz. The estimated cycles are cycles of this clock.
CLOCKS = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
CORES_PER_CHIP = {"v4": 2, "v5p": 2}  # Google Cloud counts these types in TensorCores.
FLAT = ("v5e", "v6e")  # their chips form a two-dimensional mesh
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "f64": 8, "s64": 8}


class Chip(NamedTuple):
    """The hardware of one device: bytes of memory, FLOP/s in bfloat16, and the clock rate in Hz."""

    memory: int
    peak: float
    clock: float


class Instruction(NamedTuple):
    """An instruction of a compiled program, with the estimated cycles of all its runs.

    path: The names of the JAX functions and of the modules that it comes from.
    kind: "products", "copies" or "sums", which also stands for all elementwise work.
    """

    path: str
    kind: str
    cycles: int


def describe(topology: str, num_slices: int = 1) -> tuple[Sequence[jax.Device], Chip]:
    """Returns the devices of a topology, and the hardware of each.

    topology: A type of Google Cloud, such as "v5e-16", or the shape of its chips, such as
      "v5e:4x4".
    num_slices: The number of such slices, which are connected by the data center's network.

    Raises ValueError if the topology is unknown, or if libtpu is not installed.
    """
    parts = re.fullmatch(rf"({'|'.join(CLOCKS)})(?:-(\d+)|:(\d+(?:x\d+)*))", topology)
    if not parts:
        raise ValueError(
            f"the topology {topology!r} must be one of {', '.join(CLOCKS)}, and a number of chips "
            "or their shape, such as v5e-16 or v5e:4x4"
        )
    kind, number, shape = parts.groups()
    shape = shape or _shape(kind, int(number))
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"a program for {topology} needs the TPU's compiler: "
            f'pip install "jax[tpu]=={jax.__version__}"'
        )
    # No TPU is used: neither ask the cloud for one, nor wait for another process that has one.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    try:
        found = topologies.get_topology_desc(f"{kind}:{shape}", "tpu", num_slices=num_slices)
    except RuntimeError as error:
        raise ValueError(f"no topology {topology!r}: {str(error).splitlines()[0]}") from error
    return found.devices, _chip(kind, found.devices[0])


def _shape(kind: str, number: int) -> str:
    """Returns the most compact shape of a type such as v5e-16, as in Google Cloud."""
    chips = number // CORES_PER_CHIP.get(kind, 1)
    doublings = chips.bit_length() - 1
    if chips != 2**doublings or chips < 4:
        raise ValueError(f"{kind}-{number} must have a power of 2 of at least 4 chips")
    axes = 2 if kind in FLAT else 3
    sizes = [2 ** ((doublings + axis) // axes) for axis in range(axes)]
    return "x".join(map(str, sorted(sizes, key=lambda size: (size == 1, size))))


def _chip(kind: str, device: Any) -> Chip:
    from jax.experimental.pallas import tpu  # slow to import

    version = tpu.ChipVersion[f"TPU_{kind.upper()}"]
    info = tpu.get_tpu_info_for_chip(version, device.num_cores)
    return Chip(info.hbm_capacity_bytes, float(info.bf16_ops_per_second), CLOCKS[kind])


def lines(compiled: Any) -> Iterator[tuple[str, int]]:
    """Yields the lines of a compiled program, and how often each runs. Looks into loops."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in compiled.as_text().splitlines():
        if head := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
            computations[name] = []
        elif name:
            computations[name].append(line)

    def visit(name: str, times: int) -> Iterator[tuple[str, int]]:
        for line in computations[name]:
            yield line, times
            if body := re.search(r" while\(.* body=%([\w.-]+)", line):
                count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                yield from visit(body[1], times * (int(count[1]) if count else 1))

    return visit(entry, 1)


def instructions(compiled: Any) -> Iterator[Instruction]:
    """Yields the instructions of a program compiled for a TPU that have an estimated time.

    Collectives have none.
    """
    for line, times in lines(compiled):
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
            operation = re.search(r'op_name="([^"]*)"', line)
            path = operation[1] if operation else ""
            yield Instruction(path, _kind(line, path), times * int(cycles[1]))


def _kind(line: str, path: str) -> str:
    if re.search(r"/(conv_general_dilated|dot_general)$", path):
        return "products"
    return "copies" if re.search(r" (copy|transpose|bitcast|reshape)\(", line) else "sums"


def layer(path: str) -> str:
    """Returns the layer that an instruction belongs to, in the names of `summary.layers`.

    Instructions outside the network belong to "loss", "augmentation" or "the rest".
    """
    if "(Segmenter)" not in path:
        if "jvp(" in path:
            return "loss"
        return "augmentation" if "/vmap(" in path else "the rest"
    names = path.rsplit("(Segmenter))", 1)[-1].rsplit("(Segmenter)", 1)[-1].split("/")[1:-1]
    names = [n for n in names if n.isidentifier() and not re.fullmatch(r"(Stage|Level)_\d+", n)]
    return "/".join(n for i, n in enumerate(names) if i == 0 or n != names[i - 1]) or "the rest"


def collectives(compiled: Any) -> dict[str, tuple[int, int]]:
    """Returns {kind: (number, bytes)} of the collectives of a program, for each device."""
    number, size = Counter[str](), Counter[str]()
    pattern = rf" = (\S.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\("
    for line, times in lines(compiled):
        if match := re.search(pattern, line):
            number[match[2]] += times
            size[match[2]] += times * sum(
                math.prod(map(int, filter(None, shape.split(",")))) * BYTES.get(dtype, 4)
                for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            )
    return {kind: (number[kind], size[kind]) for kind in number}
