"""Tests that PyTorch's files are read without PyTorch, and that nothing in them is executed.

torch_zip.pth and torch_early.pth are golden files, written by torch 2.14.1:

    grid = torch.arange(12.0).reshape(3, 4)
    tensors = OrderedDict(
        kernel=grid.t(), cut=grid[1:, 2:], half=grid.half()[0], short=grid.bfloat16()[1],
        count=torch.tensor(7), parameter=torch.nn.Parameter(grid[2]), flags=grid[0] > 1,
        double=grid[0].double(), none=torch.zeros(0, 3),
    )
    torch.save(tensors, file, _use_new_zipfile_serialization=file == "torch_zip.pth")
"""

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dense_jax.models import torch_files, weight_files

GRID = np.arange(12.0).reshape(3, 4)
EXPECTED = {
    "kernel": GRID.T,
    "cut": GRID[1:, 2:],
    "half": GRID[0],
    "short": GRID[1],
    "count": np.array(7),
    "parameter": GRID[2],
    "flags": GRID[0] > 1,
    "double": GRID[0],
    "none": np.zeros((0, 3)),
}
FILES = ("torch_zip.pth", "torch_early.pth")


@pytest.mark.parametrize("name", FILES)
def test_tensors_are_those_that_torch_saved(name):
    tensors = torch_files.read(str(Path(__file__).parent / name))
    assert tensors.keys() == EXPECTED.keys()
    for key, expected in EXPECTED.items():
        np.testing.assert_array_equal(np.asarray(tensors[key], expected.dtype), expected)
    dtypes = {key: str(tensors[key].dtype) for key in ("kernel", "half", "short", "count", "flags")}
    assert [*dtypes.values()] == ["float32", "float16", "bfloat16", "int64", "bool"]


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_refused(name, tmp_path):
    """Wherever it was cut."""
    content = (Path(__file__).parent / name).read_bytes()
    path = tmp_path / name
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"\.pth cannot be read"):
            weight_files.read(path)


class Call:
    """Pickles as a call of a function, which unpickling would perform."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def archive_of(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
    return file.getvalue()


def early_file_of(content):
    parts = torch_files.MAGIC, 1001, {"little_endian": True}, content, []
    return b"".join(pickle.dumps(part, protocol=2) for part in parts)


@pytest.mark.parametrize("write", [archive_of, early_file_of])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Call(os.mkdir, "made"), "it holds posix.mkdir, not tensors alone"),
        (Call(eval, "os.mkdir('made')"), "eval, not tensors alone"),
        (Call(getattr, Call(__import__, "os"), "mkdir"), "not tensors alone"),
        ({"a": np.zeros(3)}, "numpy.* not tensors alone"),
        ({"epoch": 3}, "it holds epoch, not tensors alone"),
        ({"state_dict": collections.OrderedDict()}, "it holds state_dict, not tensors alone"),
        ([1, 2], "not tensors alone"),
    ],
)
def test_nothing_but_tensors_is_unpickled(write, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    path.write_bytes(write(content))
    with pytest.raises(ValueError, match=message):
        weight_files.read(path)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(1, (4,), (1,)), (0, (3, 3), (1, 1)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2**62,), (1,))],
    ids=str,
)
def test_a_tensor_beyond_its_storage_is_refused(offset, shape, strides):
    tensor = torch_files.Tensor("float32", "0", offset, shape, strides)
    with pytest.raises((ValueError, TypeError)):
        tensor.array(bytes(16))
