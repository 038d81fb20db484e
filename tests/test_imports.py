"""Tests that each module imports only modules in the layers below."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# The page of the architecture. Imports run down: a room may import the rooms of the rows below its
# own, not those beside it. A row without a star is a room, or a module, that takes plain arguments;
# only those with a star see the whole config.
FLOORS = (
    ("__main__",),
    ("main *", "plan", "evaluate *", "predict", "export *", "demo", "summary *", "sweep", "report"),
    ("train *", "card *"),
    ("training *",),
    ("evaluation",),
    ("inference",),
    ("trained *",),
    ("program *", "config *", "workdir"),
    ("models", "losses", "metrics", "outputs", "data", "devices"),
    ("command", "drawing"),
    ("class_colors",),
    ("regions",),
    ("labels", "storage", "spelling", "geometry", "hub"),
    ("buckets",),
)
# Rooms and modules that start without jax, flax and optax.
NEVER_JAX = (
    "__main__",
    "config",
    "command",
    "data",
    "sweep",
    "report",
    "drawing",
    "class_colors",
    "regions",
    "labels",
    "storage",
    "spelling",
    "geometry",
    "hub",
    "buckets",
)
NEVER_JAX_FILES = (
    *("metrics/boundary", "metrics/instances", "evaluation/per_image", "evaluation/class_maps"),
    *("inference/image_files", "inference/object_maps", "inference/stitching"),
    *("inference/threads", "inference/writers"),
    *("evaluation/baselines", "evaluation/worst", "workdir/curve"),
)


def imported(path: Path) -> set[str]:
    """The dotted names of all modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports would hide from this test"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(folder: str) -> list[Path]:
    path = REPOSITORY / folder
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


ROOMS = [[room.removesuffix(" *") for room in floor] for floor in FLOORS]
HEIGHT = {room: -i for i, floor in enumerate(ROOMS) for room in floor}


def test_every_room_has_a_floor():
    there = {path.stem for path in (REPOSITORY / "dense_jax").iterdir()}
    assert set(HEIGHT) == there - {"__pycache__", "__init__", "experiments"}


@pytest.mark.parametrize("path", files("dense_jax"), ids=lambda path: path.stem)
def test_imports_run_down(path):
    # A project may have a package of its own of that name.
    assert "experiments" not in {name.split(".")[0] for name in imported(path)}
    room = path.relative_to(REPOSITORY / "dense_jax").parts[0].removesuffix(".py")
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("dense_jax.")}
    lower = {other for other, height in HEIGHT.items() if height < HEIGHT.get(room, 1)}
    assert ours - {room} <= lower


@pytest.mark.parametrize("name", [*NEVER_JAX, *NEVER_JAX_FILES])
def test_no_jax_where_it_does_not_belong(name):
    path = REPOSITORY / "dense_jax" / name
    for file in files(str(path)) or files(f"{path}.py"):
        roots = {root.split(".")[0] for root in imported(file)}
        assert not roots & {"jax", "flax", "optax", "orbax"}, file


def test_training_needs_neither_tensorflow_nor_torch():
    """Importing either fails here; tensorboardX would import torch where it is installed."""
    code = (
        "import sys; sys.modules |= {'tensorflow': None, 'torch': None}; "
        "from dense_jax import train; print('tensorflow_datasets' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
