"""Loads published encoder weights from files with torchvision's or timm's tensor names.

The file must contain every tensor of the encoder, with the expected shape. Any additional tensors
must belong to the classification head.

The published networks read RGB images. `normalization` converts a gray image to RGB. For images
with another number of channels, `input_kernel` adapts the first convolution.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dense_jax.models import weight_files
from dense_jax.models.encoders import ENCODERS

OPTION = "model.pretrained"
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "gamma": "gamma",
}
HEADS = (
    *("classifier.6.", "fc.", "aux1.", "aux2.", "conv_head.", "head.norm."),
    *("_conv_head.", "_bn1.", "_fc."),  # efficientnet_lite0
)
FULLY_CONNECTED = "classifier."  # fc6 and fc7, which an encoder may omit
# timm stores VGG's fully connected layers as convolutions, under other names.
TIMM = {"pre_logits.fc1.": "classifier.0.", "pre_logits.fc2.": "classifier.3.", "head.fc.": "fc."}


def load(
    source: str, encoder: str, norm: str, shapes: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the published variables of an encoder as float32 NumPy arrays, and their origin.

    source: "imagenet" for the encoder's published weights, or a source of `weight_files.find`.
    norm: The `model.norm` of the encoder.
    shapes: The shapes of the encoder's variables, {"params": ..., "batch_stats": ...}.

    The origin has the `source` and the `sha256` of the file, and its `license`, or None if the
    license is not known.

    Raises ValueError if the encoder has no published weights, or if the file is missing, changed
    or unreadable, or does not fit the encoder. The message lists missing, unexpected and wrongly
    shaped tensors.
    """
    _, torch_name, weights = ENCODERS[encoder]
    if torch_name is None or weights is None:
        published = [name for name, entry in ENCODERS.items() if entry.weights]
        raise ValueError(
            f"{OPTION}={source!r}: encoder {encoder!r} has no published weights, only "
            f"{', '.join(published)} have; leave {OPTION} unset"
        )
    source = weights.source if source == "imagenet" else source
    path = weight_files.find(source, OPTION)
    if path.is_dir():
        raise ValueError(f"{OPTION}={source!r} is a folder: name a file of weights in it")
    sha256 = weight_files.sha256(path)
    is_published = source == weights.source
    if is_published and not sha256.startswith(weights.sha256 or ""):
        raise ValueError(
            f"{path} is not the published file {source}: its SHA-256 is {sha256}, not "
            f"{weights.sha256}. Remove the file, and get it again"
        )
    variables = convert(weight_files.read(path), path, encoder, norm, shapes)
    license = weights.license if is_published else None
    return variables, {"source": source, "sha256": sha256, "license": license}


def convert(
    tensors: Mapping[str, np.ndarray],
    path: Any,
    encoder: str,
    norm: str,
    shapes: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the variables of an encoder, made from the tensors of the file at `path`."""
    torch_name: Any = ENCODERS[encoder].torch_name
    tensors = {name: array for name, array in tensors.items() if "num_batches" not in name}
    for theirs, ours in TIMM.items():
        tensors = {name.replace(theirs, ours): array for name, array in tensors.items()}
    used, norms, problems = set(), set(), []

    def variable(path_of_leaf, shape):
        _, *modules, leaf = (key.key for key in path_of_leaf)
        name = f"{torch_name(tuple(modules), norm=norm)}.{LEAVES[leaf]}"
        used.add(name)
        norms.update({"batch", "group"}.intersection(modules))
        if name not in tensors:
            problems.append(f"  missing: {name}")
            return None
        array, expected = tensors[name], shape.shape
        if leaf == "kernel":
            *size, channels, features = shape.shape
            expected = features, channels, *size
            if array.shape == (features, channels * math.prod(size)):  # fully connected
                array = array.reshape(expected)
            if array.shape == (features, 3, *size):
                array = input_kernel(array, channels)
        if array.shape != expected:
            problems.append(f"  of another shape: {name} is {array.shape}, not {expected}")
            return None
        array = np.asarray(array, np.float32)
        return np.moveaxis(array, (1, 0), (-2, -1)) if leaf == "kernel" else array

    variables = jax.tree_util.tree_map_with_path(variable, dict(shapes))
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
        is_other = norms != ({"batch"} if has_norm else set())
        raise ValueError(
            f"{path} does not fit encoder {encoder!r} with norm {norm!r}."
            f"{hint if is_other else ''} Its tensors:\n" + "\n".join(problems)
        )
    return variables


def input_kernel(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Adapts the kernel of an RGB network's first convolution to another number of channels.

    One channel (gray) gets the sum of the kernels for R, G and B. If n > 1, n channels get the
    kernels for R, G, B, R and so on, multiplied by 3 / n. Features then keep their magnitude. The
    library timm has the same convention.

    kernel: [features, 3, h, w], as in PyTorch. The result is [features, channels, h, w].
    """
    if channels == 1:
        return kernel.sum(axis=1, keepdims=True)
    return kernel[:, np.arange(channels) % 3] * (3 / channels)
