"""Writes features that PyTorch's libraries compute, for CI to compare our networks with.

    python -m benchmarks.parity [NAME ...]

writes tests/models/golden/NAME.npz for each of NETWORKS. Needs torch, torchvision, timm, transformers
and efficientnet_lite_pytorch, but neither JAX nor published weights: `formula` fills the networks. A
file holds the name and shape of every tensor of the network, and some of the features by stride.
"""

import functools
import pathlib
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "models" / "golden"


def uniform(name: str, shape: Sequence[int]) -> np.ndarray:
    """Returns float32 values between -1 and 1, which depend on the name and the shape alone."""
    random = np.random.RandomState(zlib.crc32(name.encode()))  # the same in all versions of NumPy
    return np.resize(random.uniform(-1, 1, 9973).astype(np.float32), shape)


def formula(name: str, shape: Sequence[int]) -> np.ndarray:
    """Returns a weight, computed from its name in a PyTorch network and its shape.

    Kernels have the variance 2 / fan-in. Scales and variances are between 1/2 and 1, other vectors
    between -1/4 and 1/4. In a deep network, features then neither explode nor vanish.
    """
    values = uniform(name, shape)
    if max(shape) < np.prod(shape):
        return values * np.float32((6 / np.prod(shape[1:])) ** 0.5)
    return values / 4 + np.float32(0.75 * name.endswith(("weight", "running_var", "gamma")))


def image(name: str) -> np.ndarray:
    """Returns the input of a network, [1, h, w, 3], with values between -2 and 2."""
    return 2 * uniform("image", (1, *NETWORKS[name].size, 3))


def sample(features: np.ndarray) -> np.ndarray:
    """Returns 256 values of features [b, h, w, c], spread over all axes."""
    return features.ravel()[np.arange(256) * 1_000_003 % features.size].astype(np.float32)


def save(name: str, shapes: Mapping[str, Sequence[int]], features: Mapping[str, Any]) -> None:
    """Writes the names and shapes of a network's tensors, and its features [b, h, w, c]."""
    lines = [" ".join([tensor, *map(str, shape)]) for tensor, shape in shapes.items()]
    arrays = {key: sample(x) for key, x in features.items()}
    arrays |= {f"{key}_shape": np.array(x.shape) for key, x in features.items()}
    np.savez_compressed(FOLDER / f"{name}.npz", tensors="\n".join(lines).encode(), **arrays)


def load(name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
    """Returns the shapes of a network's tensors, and its samples with the features' shapes."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    lines = arrays.pop("tensors").item().decode().splitlines()
    split = [line.split() for line in lines]
    return {tensor: tuple(map(int, shape)) for tensor, *shape in split}, arrays


class Network(NamedTuple):
    """A network of a library.

    make: The function that makes it.
    modules: The names of the modules whose outputs are the features, by stride.
    size: The height and width of the image in pixels.
    """

    make: Callable[[], Any]
    modules: Mapping[int, str]
    size: tuple[int, int] = (64, 96)


def _torchvision(name: str, modules: Mapping[int, str], size=(64, 96), **options: Any) -> Network:
    def make():
        import torchvision

        return torchvision.models.get_model(name, **options)

    return Network(make, modules, size)


def _timm(name: str, modules: Mapping[int, str], **options: Any) -> Network:
    def make():
        import timm

        return timm.create_model(name, **options)

    return Network(make, modules)


def _efficientnet_lite0() -> Any:
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0")


def _segformer(depths: Sequence[int], head_width: int) -> Network:
    def make():
        from transformers import SegformerConfig, SegformerForImageClassification

        hidden_sizes = [head_width * n for n in (1, 2, 5, 8)]
        return SegformerForImageClassification(
            SegformerConfig(depths=depths, hidden_sizes=hidden_sizes)
        )

    return Network(make, {4 * 2**i: f"segformer.stages.{i}" for i in range(4)})


RESNET = {2: "relu", 4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"}
VGG = (1, 2, 4, 8, 16, 32)
GOOGLENET = {2: "conv1", 4: "conv3", 8: "inception3b", 16: "inception4e", 32: "inception5b"}
LITE0 = {2: "_blocks.0", 4: "_blocks.2", 8: "_blocks.4", 16: "_blocks.10", 32: "_blocks.15"}
MOBILENET = {2: "blocks.0", 4: "blocks.1", 8: "blocks.2", 16: "blocks.4", 32: "blocks.6"}
CONVNEXT = {4 * 2**i: f"stages.{i}" for i in range(4)}
NETWORKS = {
    "alexnet": _torchvision(
        "alexnet", {4: "features.1", 8: "features.4", 16: "features.11", 32: "features.12"}
    ),
    # The classifier, after the pools, at the size for which the network is published.
    "alexnet_fcn": _torchvision(
        "alexnet",
        {4: "features.1", 8: "features.2", 16: "features.5", 32: "classifier.5"},
        size=(224, 224),
    ),
    "vgg16": _torchvision(
        "vgg16", {s: f"features.{i}" for s, i in zip(VGG, (3, 8, 15, 22, 29, 30), strict=True)}
    ),
    "vgg16_bn": _torchvision(
        "vgg16_bn", {s: f"features.{i}" for s, i in zip(VGG, (5, 12, 22, 32, 42, 43), strict=True)}
    ),
    "googlenet": _torchvision("googlenet", GOOGLENET, init_weights=False),
    "resnet18": _torchvision("resnet18", RESNET),
    "resnet18_dilated": _timm("resnet18", {2: "act1", 4: "layer1", 8: "layer4"}, output_stride=8),
    "resnet34": _torchvision("resnet34", RESNET),
    "resnet50": _torchvision("resnet50", RESNET),
    "resnet101": _torchvision("resnet101", RESNET),
    "mobilenet_v3_large": _timm("mobilenetv3_large_100", MOBILENET),
    "mobilenet_v3_large_dilated": _timm(
        "mobilenetv3_large_100",
        {2: "blocks.0", 4: "blocks.1", 8: "blocks.6"},
        features_only=True,
        output_stride=8,
    ),
    "efficientnet_lite0": Network(_efficientnet_lite0, LITE0),
    "convnext_tiny": _timm("convnext_tiny", CONVNEXT),
    "convnext_small": _timm("convnext_small", CONVNEXT),
    "mit_b0": _segformer((2, 2, 2, 2), 32),
    "mit_b1": _segformer((2, 2, 2, 2), 64),
    "mit_b2": _segformer((3, 4, 6, 3), 64),
}


def fill(network: Any) -> dict[str, tuple[int, ...]]:
    """Fills a PyTorch network by `formula`. Returns the shapes of its tensors by published name."""
    import torch

    state = {n: x for n, x in network.state_dict().items() if "num_batches" not in n}
    if hasattr(network, "save_pretrained"):  # transformers, whose files have other names
        from transformers.core_model_loading import revert_weight_conversion

        state = revert_weight_conversion(network, state)
    for name, tensor in state.items():
        tensor.copy_(torch.from_numpy(formula(name, tuple(tensor.shape))))
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def write(name: str) -> None:
    """Writes the golden file of a network."""
    import torch

    network, outputs = NETWORKS[name].make().eval().requires_grad_(False), {}
    shapes = fill(network)

    def keep(stride, module, args, output):
        output = output[(..., *[None] * (4 - output.ndim))]  # vectors: maps of 1 x 1
        outputs[str(stride)] = output.permute(0, 2, 3, 1).numpy().copy()

    for stride, module in NETWORKS[name].modules.items():
        network.get_submodule(module).register_forward_hook(functools.partial(keep, stride))
    network(torch.from_numpy(image(name).transpose(0, 3, 1, 2)))
    save(name, shapes, outputs)


if __name__ == "__main__":
    for network_name in sys.argv[1:] or NETWORKS:
        write(network_name)
