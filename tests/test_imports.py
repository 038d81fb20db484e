"""Who may import whom: the rooms of the house stay apart."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

EVERYTHING = {path.stem for path in (REPOSITORY / "dense_jax").iterdir()} - {"__pycache__"}
COMMANDS = {"demo", "main", "evaluate", "export", "memory", "predict", "sweep", "report"}
ALLOWED = {
    "__init__": {"predictor"},
    "labels": set(),
    "spelling": set(),
    "command": {"spelling"},
    "losses": {"labels"},
    "metrics": {"boundary", "labels"},
    "boundary": {"labels"},
    "objects": set(),
    "distributed": set(),
    "processes": set(),
    "per_image": {"boundary", "labels", "objects", "processes"},
    "tallies": {"boundary", "metrics"},
    "augment": {"colour", "labels"},
    "colour": set(),
    "tiles": {"labels"},
    "plots": {"labels"},
    "predictions": {"plots"},
    "steps": set(),
    "normalise": set(),
    "optim": set(),
    "mesh": set(),
    "device_cache": {"data", "mesh"},
    "checkpoint": set(),
    "config": {"command", "data", "losses", "models", "normalise", "optim", "spelling"},
    "cost": set(),
    "member": {"checkpoint", "logger", "metrics", "workdir"},
    "workdir": set(),
    "logger": {"workdir"},
    "scoring": {"data", "labels", "mesh", "tiles"},
    "data": {"command", "data", "labels", "objects", "plots", "processes"},
    "models": {"models", "spelling"},
    "run": {
        *("augment", "checkpoint", "device_cache", "losses", "mesh", "metrics", "models"),
        *("normalise", "optim", "steps", "workdir"),
    },
    "train": EVERYTHING - COMMANDS,
    "startup": {"data", "logger"},
    "main": {"command", "distributed", "startup", "train"},
    "evaluate": EVERYTHING - COMMANDS,
    "memory": {"command", "config", "cost", "mesh", "run", "startup"},
    "predict": {
        *("background", "command", "image_files", "mosaic", "plots", "predictor", "results"),
        *("startup", "tta"),
    },
    "predictor": {"background", "exported", "mesh", "mosaic", "run", "tiles", "tta"},
    "exported": set(),
    "export": {"command", "exported", "run", "startup", "workdir"},
    "demo": {"command", "data", "plots", "predictor", "startup"},
    "background": set(),
    "image_files": {"data"},
    "mosaic": {"tiles"},
    "results": set(),
    "tta": set(),
    "sweep": {"command", "distributed", "jobs", "workdir"},
    "jobs": {"workdir"},
    "report": {
        *("boundary", "command", "data", "labels", "metrics", "plots", "predictions", "report"),
        "workdir",
    },
}
NEVER_JAX = (
    *("dense_jax/boundary.py", "dense_jax/objects.py", "dense_jax/per_image.py"),
    *("dense_jax/processes.py", "dense_jax/plots.py", "dense_jax/predictions.py"),
    *("dense_jax/data", "dense_jax/sweep.py", "dense_jax/jobs.py", "experiments"),
    *("dense_jax/background.py", "dense_jax/image_files.py", "dense_jax/mosaic.py"),
    *("dense_jax/results.py", "dense_jax/tiles.py", "dense_jax/command.py"),
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


def test_every_room_has_its_rule():
    assert set(ALLOWED) == EVERYTHING


@pytest.mark.parametrize("path", files("dense_jax"), ids=lambda path: path.stem)
def test_rooms_import_only_what_they_may(path):
    # A project may have a package of its own of that name.
    assert "experiments" not in {name.split(".")[0] for name in imported(path)}
    room = path.relative_to(REPOSITORY / "dense_jax").parts[0].removesuffix(".py")
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("dense_jax.")}
    # The summary is a command that lives with the models.
    also = {"command", "cost", "memory"} if path.name == "summary.py" else set()
    assert ours <= ALLOWED[room] | also


@pytest.mark.parametrize("folder", NEVER_JAX)
def test_no_jax_where_it_does_not_belong(folder):
    for path in files(folder):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"jax", "flax", "optax", "orbax"}, path


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
