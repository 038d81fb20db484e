"""Reads weight files written by torch.save, without PyTorch and without executing their content.

A file holds a pickle and the values of storages. The pickle describes tensors as views of
storages. PyTorch 1.6 and later write a zip archive. Earlier versions write several pickles, and
then the values. Ordinary unpickling calls any function that a file names. Here, a file can only
describe tensors and dicts.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of an early file
DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class Tensor(NamedTuple):
    """The description of a tensor. `offset` and `strides` are in elements of the storage `key`."""

    dtype: str
    key: str
    offset: int
    shape: Sequence[int]
    strides: Sequence[int]

    def array(self, storage: bytes | memoryview) -> np.ndarray:
        """Returns a view of the storage. Raises an exception if the storage is too small."""
        dtype = jnp.dtype(self.dtype)
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.ndarray(self.shape, dtype, storage, self.offset * dtype.itemsize, strides)


def read(path: str) -> dict[str, np.ndarray]:
    """Returns {name: tensor} from a saved state_dict.

    Raises an exception of many possible types if the file is damaged or holds other objects.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"
        file.seek(0)
        tensors, storage = (_open_zip if is_zip else _open_early)(file)
        if not isinstance(tensors, dict) or not all(
            isinstance(x, Tensor) for x in tensors.values()
        ):
            raise ValueError(f"it holds {', '.join(map(str, tensors))}, not tensors alone")
        return {str(name): tensor.array(storage(tensor.key)) for name, tensor in tensors.items()}


def _open_zip(file: io.BufferedIOBase) -> tuple[Any, Callable[[str], bytes]]:
    """Returns the unpickled content of a zip archive, and a function that reads a storage."""
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    folder = next((name for name in names if name.endswith("/data.pkl")), "/").rpartition("/")[0]
    order = f"{folder}/byteorder"
    if order in names and archive.read(order) != b"little":
        raise ValueError("its numbers are big-endian")
    content = _Unpickler(io.BytesIO(archive.read(f"{folder}/data.pkl"))).load()
    return content, lambda key: archive.read(f"{folder}/data/{key}")


def _open_early(file: io.BufferedIOBase) -> tuple[Any, Callable[[str], memoryview]]:
    """Returns the unpickled content of an early file, and a function that returns a storage."""
    if _Unpickler(file).load() != MAGIC:
        raise ValueError("it is not a file of torch.save")
    _, system = _Unpickler(file).load(), _Unpickler(file).load()
    if not system["little_endian"]:
        raise ValueError("its numbers are big-endian")
    unpickler = _Unpickler(file)
    content = unpickler.load()
    keys = _Unpickler(file).load()
    values, start, storages = memoryview(file.read()), 0, {}
    for key in keys:  # each storage follows its number of elements
        length = int.from_bytes(values[start : start + 8], "little")
        start += 8
        end = start + length * jnp.dtype(unpickler.dtypes[key]).itemsize
        storages[key], start = values[start:end], end
    return content, storages.__getitem__


class _Unpickler(pickle.Unpickler):
    """Unpickles numbers, strings, lists, dicts and tensors.

    dtypes: The dtype of each storage that the pickle refers to.
    """

    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file)
        self.dtypes: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, not tensors alone")
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        """Returns the dtype and the key of a storage."""
        _, dtype, key, *_ = pid
        self.dtypes[key] = dtype
        return dtype, key

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
        dtype, key = storage
        return Tensor(dtype, key, offset, shape, strides)

    def _parameter(self, tensor: Any, *_: Any) -> Any:
        return tensor
