"""PyTorch versions of some of our networks, for comparing speed. Requires `torch`.

`Network(model)` computes the same function as the Segmenter `model` if the image size is a multiple
of the deepest stride. It supports the decoder "unet" with the encoder "plain" or "resnet34", and
"fcn" with "vgg16". Submodules have the same names as in the Segmenter, so that `load` can copy the
variables. Images are [batch, channel, h, w], in PyTorch's channels-last memory format.
"""

import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dense_jax.models import layers, upsampling
from dense_jax.models.encoders import vgg


class ConvNorm(nn.Module):
    """A convolution, a batch norm (optional) and a ReLU (optional)."""

    def __init__(self, inputs, features, kernel_size=3, stride=1, *, norm="batch", relu=True):
        super().__init__()
        with_bias, padding = norm == "none", kernel_size // 2
        self.conv = nn.Conv2d(inputs, features, kernel_size, stride, padding, bias=with_bias)
        self.norm = nn.Sequential()
        if norm == "batch":
            self.norm.add_module("batch", nn.BatchNorm2d(features))
        self.relu = relu

    def forward(self, x):
        x = self.norm(self.conv(x))
        return functional.relu_(x) if self.relu else x


class ConvBlock(nn.Sequential):
    def __init__(self, inputs, features, num_convs, *args, **options):
        super().__init__()
        for i in range(1, num_convs + 1):
            self.add_module(f"conv{i}", ConvNorm(inputs, features, *args, **options))
            inputs = features


class Plain(nn.Module):
    """The plain encoder. Returns {stride: features} and {stride: switches}."""

    def __init__(self, encoder):
        super().__init__()
        self.strides, inputs = encoder.spec.strides, 3
        for stride, width in zip(self.strides, encoder.widths, strict=encoder.bottleneck):
            block = ConvBlock(inputs, width, encoder.convs_per_level, encoder.kernel_size)
            self.add_module(f"stride{stride}", block)
            inputs = width
        # Without a bottleneck, the deepest features are the max-pooled features of the last width.
        self.channels = dict(zip(self.strides, (*encoder.widths, inputs), strict=False))

    def forward(self, x):
        features, switches = {}, {}
        for stride in self.strides:
            if hasattr(self, f"stride{stride}"):
                x = getattr(self, f"stride{stride}")(x)
            features[stride] = x
            if stride < self.strides[-1]:
                x, switches[stride] = functional.max_pool2d(x, 2, return_indices=True)
        return features, switches


class VGG16(nn.Module):
    """The VGG16 encoder, with fc6 and fc7 as convolutions for FCN."""

    def __init__(self, encoder):
        super().__init__()
        self.strides, self.channels, inputs = encoder.spec.strides, {}, 3
        for number, (width, num_convs) in enumerate(vgg.STAGES, 1):
            self.channels[2 ** (number - 1)] = inputs
            for i in range(1, num_convs + 1):
                features = layers.scaled(width, encoder.width_multiplier)
                self.add_module(f"conv{number}_{i}", ConvNorm(inputs, features, norm="none"))
                inputs = features
        width = self.channels[32] = layers.scaled(4096, encoder.width_multiplier)
        self.classifier = nn.ModuleDict(
            {"fc6": nn.Conv2d(inputs, width, 7, padding=3), "fc7": nn.Conv2d(width, width, 1)}
        )
        self.dropout = encoder.dropout

    def forward(self, x):
        features = {}
        for number, (_, num_convs) in enumerate(vgg.STAGES, 1):
            features[2 ** (number - 1)] = x
            for i in range(1, num_convs + 1):
                x = getattr(self, f"conv{number}_{i}")(x)
            x = functional.max_pool2d(x, 2)
        for layer in self.classifier.values():
            x = functional.dropout(functional.relu_(layer(x)), self.dropout, self.training)
        features[32] = x
        return features, {}


class BasicBlock(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = ConvNorm(inputs, width, 3, stride)
        self.conv2 = ConvNorm(width, width, relu=False)
        self.downsample = nn.Sequential()
        if stride > 1:
            self.downsample = ConvNorm(inputs, width, 1, stride, relu=False)

    def forward(self, x):
        return functional.relu_(self.conv2(self.conv1(x)).add_(self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.strides, self.depths = encoder.spec.strides, encoder.depths
        widths = [layers.scaled(64 * 2**i, encoder.width_multiplier) for i in range(4)]
        self.conv1 = ConvNorm(3, widths[0], 7, 2)
        self.channels = dict(zip(self.strides, widths[:1] + widths, strict=True))
        inputs = widths[0]
        for number, (depth, width) in enumerate(zip(self.depths, widths, strict=True), 1):
            for i in range(depth):
                block = BasicBlock(inputs, width, 2 if i == 0 and number > 1 else 1)
                self.add_module(f"layer{number}_{i}", block)
                inputs = width

    def forward(self, x):
        features = {2: (x := self.conv1(x))}
        x = functional.max_pool2d(x, 3, 2, padding=1)
        for number, depth in enumerate(self.depths, 1):
            for i in range(depth):
                x = getattr(self, f"layer{number}_{i}")(x)
            features[2 ** (number + 1)] = x
        return features, {}


class Nearest(nn.Module):
    def __init__(self, inputs, features):
        super().__init__()
        self.project = nn.Sequential()
        if inputs != features:
            self.project.add_module("conv", nn.Conv2d(inputs, features, 1))

    def forward(self, x, switches):
        return functional.interpolate(self.project(x), scale_factor=2, mode="nearest")


class MaxUnpool(Nearest):
    def forward(self, x, switches):
        return functional.max_unpool2d(self.project(x), switches, 2)


class TransposedConv(nn.ConvTranspose2d):
    def __init__(self, inputs, features):
        super().__init__(inputs, features, 2, 2)

    def forward(self, x, switches):
        return super().forward(x)


UPSAMPLERS = {
    upsampling.repeat: Nearest,
    upsampling.MaxUnpool: MaxUnpool,
    upsampling.make_transposed_conv: TransposedConv,
}


class UNet(nn.Module):
    def __init__(self, decoder, channels):
        super().__init__()
        upsample = decoder.upsample
        make = UPSAMPLERS[upsample.keywords.get("enlarge", upsample.func)]
        self.skips, stride = decoder.skips, max(channels)
        inputs = channels[stride]
        while stride > 1:
            stride //= 2
            width = decoder.widths[min(stride.bit_length(), len(decoder.widths)) - 1]
            self.add_module(f"up{stride}", make(inputs, width))
            inputs = width + (channels[stride] if stride in self.skips else 0)
            block = ConvBlock(
                inputs,
                width,
                decoder.convs_per_level,
                decoder.kernel_size,
                norm=decoder.norm,
                relu=decoder.decoder_relu,
            )
            self.add_module(f"stride{stride}", block)
            inputs = width
        self.head = nn.Conv2d(inputs, decoder.num_classes, 1)

    def forward(self, features, switches):
        stride = max(features)
        x = features[stride]
        while stride > 1:
            stride //= 2
            x = getattr(self, f"up{stride}")(x, switches.get(stride))
            if stride in self.skips:
                x = torch.cat([features[stride], x], 1)
            x = getattr(self, f"stride{stride}")(x)
        return self.head(x)


class FCN(nn.Module):
    """The FCN decoder with fixed bilinear upsampling."""

    def __init__(self, decoder, channels):
        super().__init__()
        n, self.skips = decoder.num_classes, decoder.skips
        for stride in (max(channels), *self.skips):
            self.add_module(f"score{stride}", nn.Conv2d(channels[stride], n, 1))
        stride = max(channels)
        for below in (*self.skips, 1):
            factor = stride // below
            kernel = upsampling.bilinear_kernel(2 * factor, factor, n).transpose(2, 3, 0, 1)
            up = nn.ConvTranspose2d(n, n, 2 * factor, factor, factor // 2, bias=False)
            up.weight = nn.Parameter(torch.from_numpy(kernel.copy()), requires_grad=False)
            self.add_module(f"up{below}", up)
            stride = below

    def forward(self, features, switches):
        stride = max(features)
        x = getattr(self, f"score{stride}")(features[stride])
        for below in self.skips:
            x = getattr(self, f"up{below}")(x) + getattr(self, f"score{below}")(features[below])
        return self.up1(x)


class Network(nn.Module):
    """The encoder and the decoder of a Segmenter, in PyTorch."""

    def __init__(self, model):
        super().__init__()
        kind = type(model.encoder).__name__
        self.encoder = {"Plain": Plain, "VGG16": VGG16, "ResNet": ResNet}[kind](model.encoder)
        make = {"UNet": UNet, "FCN": FCN}[type(model.decoder).__name__]
        self.decoder = make(model.decoder, self.encoder.channels)

    def forward(self, image):
        return self.decoder(*self.encoder(image))


NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def load(module: nn.Module, variables: Mapping[str, Any]) -> None:
    """Copies a Segmenter's variables to a PyTorch network. Raises KeyError if the names differ."""
    theirs = {n: x for n, x in module.state_dict().items() if "num_batches" not in n}
    fixed = {name for name, x in module.named_parameters() if not x.requires_grad}
    for path, x in jax.tree_util.tree_leaves_with_path(dict(variables)):
        *names, leaf = (key.key for key in path[1:])
        name = ".".join((*names, NAMES.get(leaf, leaf)))
        x = np.array(x)
        if leaf == "kernel":
            is_transposed = names[-1].startswith("up")
            x = x.transpose((2, 3, 0, 1) if is_transposed else (3, 2, 0, 1))
        with torch.no_grad():
            theirs.pop(name).copy_(torch.from_numpy(x))
    if theirs.keys() - fixed:
        raise KeyError(f"not in the variables: {', '.join(theirs)}")


class Twin:
    """A PyTorch network's training step and prediction on a batch, as in `speed.Ours`.

    On a GPU, the network computes in bfloat16 and is compiled. On a CPU, it computes in float32 and
    is not compiled.
    """

    def __init__(
        self,
        model: Any,
        variables: Mapping[str, Any],
        batch: Mapping[str, np.ndarray],
        *,
        on_gpu: bool,
    ):
        network = Network(model)
        load(network, variables)
        self._device = torch.device("cuda" if on_gpu else "cpu")
        network.to(self._device, memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, 1e-3, weight_decay=1e-4, fused=True)
        self._network: Any = torch.compile(network) if on_gpu else network
        self._image = torch.from_numpy(batch["image"]).to(self._device).permute(0, 3, 1, 2)
        self._label = torch.from_numpy(batch["label"]).to(self._device)

    def _apply(self) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self._device.type == "cuda"):
            return self._network(self._image.float() / 63.75 - 2.0)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def train(self) -> None:
        self._network.train()
        logits = self._apply().float()
        loss = functional.cross_entropy(logits, self._label.long(), ignore_index=255)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._wait()

    def logits(self) -> np.ndarray:
        """Returns the logits in evaluation mode, [b, h, w, num_classes]."""
        self._network.eval()
        with torch.inference_mode():
            return self._apply().permute(0, 2, 3, 1).float().cpu().numpy()

    def predict(self) -> None:
        self._network.eval()
        with torch.inference_mode():
            self._apply().argmax(1)
        self._wait()

    def peak_bytes(self) -> int:
        """Returns the peak memory of a training step, including parameters and optimizer state."""
        self.train()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.train()
            return torch.cuda.max_memory_allocated()
        moments = [x for each in self._optimizer.state.values() for x in each.values()]
        state = [
            *self._network.state_dict().values(),
            *moments,
            *(p.grad for p in self._parameters),
        ]
        with torch.profiler.profile(profile_memory=True) as profile:
            self.train()
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            profile.export_chrome_trace(file.name)
            events = json.loads(pathlib.Path(file.name).read_text())["traceEvents"]
        most = max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]")
        return most + sum(x.nbytes for x in state)
