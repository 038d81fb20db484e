"""Loads published encoder weights from files with torchvision's or timm's tensor names.

`load` reads FILE.safetensors, FILE.npz, FILE.pth (if torch is installed) or hf://REPO/FILE. The
file must contain every tensor of the encoder, with the expected shape. Any additional tensors
must belong to the classification head.
"""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dense_jax.models.encoders import ENCODERS

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
HEADS = ("classifier.6.", "fc.", "aux1.", "aux2.", "_conv_head.", "_bn1.", "_fc.")
FULLY_CONNECTED = "classifier."  # fc6 and fc7, which an encoder may omit
# The exceptions that readers raise for a damaged file or a file in another format.
UNREADABLE = (
    *(OSError, ValueError, TypeError, RuntimeError, EOFError, AttributeError),
    *(SafetensorError, zipfile.BadZipFile, UnpicklingError),
)
# timm stores VGG's fully connected layers as convolutions, under other names.
TIMM = {"pre_logits.fc1.": "classifier.0.", "pre_logits.fc2.": "classifier.3.", "head.fc.": "fc."}


def load(path: str, encoder: str, norm: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the published variables of an encoder as float32 NumPy arrays.

    norm: The `model.norm` of the encoder.
    shapes: The shapes of the encoder's variables, {"params": ..., "batch_stats": ...}.

    Raises ValueError if the encoder has no published weights, or if the file is unreadable or does
    not fit the encoder. The message lists missing, unexpected and wrongly shaped tensors.
    """
    torch_name = ENCODERS[encoder].torch_name
    if torch_name is None:
        published = [name for name, entry in ENCODERS.items() if entry.torch_name]
        raise ValueError(
            f"model.pretrained={path!r}: encoder {encoder!r} has no published weights, only "
            f"{', '.join(published)} have; leave model.pretrained unset"
        )
    tensors = {name: array for name, array in read(path).items() if "num_batches" not in name}
    for theirs, ours in TIMM.items():
        tensors = {name.replace(theirs, ours): array for name, array in tensors.items()}
    used, problems = set(), []

    def convert(path_of_leaf, shape):
        _, *modules, leaf = (key.key for key in path_of_leaf)
        name = f"{torch_name(tuple(modules), norm=norm)}.{LEAVES[leaf]}"
        used.add(name)
        if name not in tensors:
            problems.append(f"  missing: {name}")
            return None
        array, expected = tensors[name], shape.shape
        if leaf == "kernel":
            h, w, channels, features = shape.shape
            expected = features, channels, h, w
            if array.shape == (features, channels * h * w):  # fully connected
                array = array.reshape(expected)
        if array.shape != expected:
            problems.append(f"  of another shape: {name} is {array.shape}, not {expected}")
            return None
        array = np.asarray(array, np.float32)
        return array.transpose(2, 3, 1, 0) if leaf == "kernel" else array

    variables = jax.tree_util.tree_map_with_path(convert, dict(shapes))
    heads = HEADS
    if not any(name.startswith(FULLY_CONNECTED) for name in used):
        heads += (FULLY_CONNECTED,)
    problems += [
        f"  left over: {name}"
        for name in sorted(tensors.keys() - used)
        if not name.startswith(heads)
    ]
    if problems:
        has_norm = any(name.endswith("running_mean") for name in tensors)
        theirs, word = ("batch", "with") if has_norm else ("none", "without")
        hint = f" Its network is one {word} batch norm: set model.norm={theirs}."
        raise ValueError(
            f"model.pretrained={path!r} does not fit encoder {encoder!r} with norm {norm!r}."
            f"{hint if norm != theirs else ''} Its tensors:\n" + "\n".join(problems)
        )
    return variables


def read(path: str) -> dict[str, np.ndarray]:
    """Returns {name: tensor} from a weight file. Raises ValueError if the file cannot be read."""
    if path.startswith("hf://"):
        return read(_download(path))
    if Path(path).suffix not in READERS:
        raise ValueError(
            f"model.pretrained={path!r} must end in one of {', '.join(READERS)} or be "
            "hf://REPO/FILE"
        )
    if not Path(path).is_file():
        raise ValueError(f"model.pretrained={path!r}: there is no such file")
    try:
        return READERS[Path(path).suffix](path)
    except UNREADABLE as error:
        raise ValueError(f"model.pretrained={path!r} cannot be read: {error}") from error


def _read_npz(path: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_torch(path: str) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            "a file of PyTorch needs torch installed to be read; or convert it to safetensors"
        ) from error
    # Loads only tensors, because unpickling other objects may run code.
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"it holds {', '.join(tensors)}, not tensors alone: save the state_dict")
    return {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}


def _download(path: str) -> str:
    """Downloads hf://OWNER/NAME/FILE and returns the file's path in the local cache."""
    import huggingface_hub  # slow to import, and few runs need it

    owner, _, rest = path.removeprefix("hf://").partition("/")
    name, _, file = rest.partition("/")
    if not file:
        raise ValueError(f"model.pretrained={path!r} must be hf://OWNER/NAME/FILE")
    try:
        return huggingface_hub.hf_hub_download(f"{owner}/{name}", file)
    except (OSError, ValueError) as error:  # the base classes of huggingface_hub's errors
        raise ValueError(f"model.pretrained={path!r} cannot be downloaded: {error}") from error


READERS: dict[str, Callable[[str], dict[str, np.ndarray]]] = {
    ".safetensors": load_file,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pt": _read_torch,
}
