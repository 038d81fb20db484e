"""PyTorch references for the classification networks whose weights can be imported.

`state_dict()` has the names in the published checkpoints, which fit with a width `multiplier` of 1
and 1000 classes. The multiplier scales every published number of channels separately. The
concatenated branches of GoogLeNet have the sum of the scaled numbers. The method `forward` of a
network returns its features by stride.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn.functional import max_pool2d


def scaled(channels: int, multiplier: float) -> int:
    """max(1, round(multiplier · channels)); a half goes to the even neighbor."""
    return max(1, round(multiplier * channels))


class Plain(nn.Module):
    """Layers one after another (`features`, a pool last), then fully connected ones."""

    def around_pools(self, x):
        """What enters each pool by its stride, with the last output; each output by its own."""
        stride = self.features[0].stride[0]
        entering, leaving = {}, {}
        for layer in self.features:
            y = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                entering[stride], leaving[2 * stride] = x, y
                stride *= 2
            x = y
        return entering | {stride: x}, leaving

    def forward(self, image):
        return self.around_pools(image)[0]


class AlexNet(Plain):
    """The second version: one tower, other widths, no local response normalization."""

    def __init__(self, multiplier: float, num_classes: int = 5):
        super().__init__()
        a, b, c, d, fc = (scaled(n, multiplier) for n in (64, 192, 384, 256, 4096))
        self.features = nn.Sequential(
            *(nn.Conv2d(3, a, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(b, c, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(c, d, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(d, d, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        )
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(d * 6 * 6, fc), nn.ReLU()),
            *(nn.Dropout(), nn.Linear(fc, fc), nn.ReLU()),
            nn.Linear(fc, num_classes),
        )


class VGG16(Plain):
    """Configuration D; with batch normalization its convolutions keep their biases."""

    def __init__(self, batch_norm: bool, multiplier: float, num_classes: int = 5):
        super().__init__()
        layers, inputs, fc = [], 3, scaled(4096, multiplier)
        for channels, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            outputs = scaled(channels, multiplier)
            for _ in range(repeats):
                norm = [nn.BatchNorm2d(outputs)] if batch_norm else []
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), *norm, nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            *(nn.Linear(inputs * 7 * 7, fc), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(fc, fc), nn.ReLU(), nn.Dropout()),
            nn.Linear(fc, num_classes),
        )


def basic_conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """GoogLeNet's convolution, with the batch normalization that its paper did not have yet."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    norm = nn.BatchNorm2d(outputs, eps=1e-3)
    return nn.Sequential(OrderedDict(conv=conv, bn=norm, relu=nn.ReLU()))


class Inception(nn.Module):
    """Four branches, concatenated; the paper's 5×5 is 3×3 in the published weights."""

    def __init__(self, inputs: int, one: int, reduce3, three, reduce5, five, pool: int):
        super().__init__()
        self.branch1 = basic_conv(inputs, one, 1)
        self.branch2 = nn.Sequential(basic_conv(inputs, reduce3, 1), basic_conv(reduce3, three, 3))
        self.branch3 = nn.Sequential(basic_conv(inputs, reduce5, 1), basic_conv(reduce5, five, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), basic_conv(inputs, pool, 1))
        self.outputs = one + three + five + pool

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    """Inception v1; the auxiliary heads are here for their names and never run."""

    INCEPTIONS = (  # Table 1: 1×1, 3×3 reduce, 3×3, 5×5 reduce, 5×5, pool
        *(("3a", 64, 96, 128, 16, 32, 32), ("3b", 128, 128, 192, 32, 96, 64)),
        *(("4a", 192, 96, 208, 16, 48, 64), ("4b", 160, 112, 224, 24, 64, 64)),
        *(("4c", 128, 128, 256, 24, 64, 64), ("4d", 112, 144, 288, 32, 64, 64)),
        *(("4e", 256, 160, 320, 32, 128, 128), ("5a", 256, 160, 320, 32, 128, 128)),
        ("5b", 384, 192, 384, 48, 128, 128),
    )

    def __init__(self, multiplier: float, num_classes: int = 5):
        super().__init__()
        first, inputs = scaled(64, multiplier), scaled(192, multiplier)
        self.conv1 = basic_conv(3, first, 7, stride=2)
        self.conv2 = basic_conv(first, first, 1)
        self.conv3 = basic_conv(first, inputs, 3)
        for name, *channels in self.INCEPTIONS:
            block = Inception(inputs, *(scaled(n, multiplier) for n in channels))
            self.add_module(f"inception{name}", block)
            inputs = block.outputs
        width, fc = scaled(128, multiplier), scaled(1024, multiplier)
        for name, block in (("aux1", self.inception4a), ("aux2", self.inception4d)):
            head = {"conv": basic_conv(block.outputs, width, 1)}
            head |= {"fc1": nn.Linear(width * 4 * 4, fc), "fc2": nn.Linear(fc, num_classes)}
            self.add_module(name, nn.ModuleDict(head))
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, image):
        at2 = self.conv1(image)
        at4 = self.conv3(self.conv2(max_pool2d(at2, 3, 2, ceil_mode=True)))
        at8 = self.inception3b(self.inception3a(max_pool2d(at4, 3, 2, ceil_mode=True)))
        at16 = self.inception4a(max_pool2d(at8, 3, 2, ceil_mode=True))
        at16 = self.inception4e(self.inception4d(self.inception4c(self.inception4b(at16))))
        at32 = self.inception5b(self.inception5a(max_pool2d(at16, 2)))
        return {2: at2, 4: at4, 8: at8, 16: at16, 32: at32}


class Residual(nn.Module):
    """relu(x + convolutions), of (kernel size, stride, channels) each; the sum may project x."""

    def __init__(self, inputs: int, layers, project: bool):
        super().__init__()
        conv = lambda i, o, kernel, step: nn.Conv2d(i, o, kernel, step, kernel // 2, bias=False)
        self.depth, width, stride = len(layers), inputs, 1
        for i, (kernel, step, channels) in enumerate(layers, 1):
            self.add_module(f"conv{i}", conv(width, channels, kernel, step))
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels))
            width, stride = channels, stride * step
        projection = (conv(inputs, width, 1, stride), nn.BatchNorm2d(width)) if project else ()
        self.downsample = nn.Sequential(*projection)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        y = self.bn3(self.conv3(y.relu())) if self.depth == 3 else y
        return (self.downsample(x) + y).relu()


class ResNet(nn.Module):
    """Pairs of 3×3, or bottlenecks that expand to four times their width, stride on the 3×3."""

    def __init__(self, bottleneck: bool, repeats, multiplier: float, num_classes: int = 5):
        super().__init__()
        inputs, stem = 64, scaled(64, multiplier)
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 7, 2, padding=3, bias=False), nn.BatchNorm2d(stem)
        for i, channels in enumerate((64, 128, 256, 512)):
            outputs, stage = channels * (4 if bottleneck else 1), nn.Sequential()
            width, wide = scaled(channels, multiplier), scaled(outputs, multiplier)
            for stride in (2 if i else 1, *[1] * (repeats[i] - 1)):
                layers = [(3, stride, width), (3, 1, width)]
                if bottleneck:
                    layers = [(1, 1, width), (3, stride, width), (1, 1, wide)]
                # The published numbers decide: scaled ones can be equal where those differ.
                project = stride == 2 or inputs != outputs
                stage.append(Residual(scaled(inputs, multiplier), layers, project))
                inputs = outputs
            self.add_module(f"layer{i + 1}", stage)
        self.fc = nn.Linear(wide, num_classes)

    def forward(self, image):
        at2 = self.bn1(self.conv1(image)).relu()
        at4 = self.layer1(max_pool2d(at2, 3, 2, padding=1))
        at16 = self.layer3(at8 := self.layer2(at4))
        return {2: at2, 4: at4, 8: at8, 16: at16, 32: self.layer4(at16)}


NETWORKS = {
    "alexnet": AlexNet,
    "vgg16": lambda *args: VGG16(False, *args),
    "vgg16_bn": lambda *args: VGG16(True, *args),
    "googlenet": GoogLeNet,
    "resnet18": lambda *args: ResNet(False, (2, 2, 2, 2), *args),
    "resnet34": lambda *args: ResNet(False, (3, 4, 6, 3), *args),
    "resnet50": lambda *args: ResNet(True, (3, 4, 6, 3), *args),
}


def make(name: str, multiplier: float, num_classes: int = 5) -> nn.Module:
    """The network in evaluation mode, with weights and statistics that are random but fixed."""
    model = NETWORKS[name](multiplier, num_classes).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=random)
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.uniform_(0.4, 1.2, generator=random)
            layer.running_mean.normal_(0, 0.2, generator=random)
            layer.running_var.uniform_(0.5, 1.5, generator=random)
        if getattr(layer, "bias", None) is not None:
            layer.bias.normal_(0, 0.2, generator=random)
    return model


def features(model: nn.Module, image: torch.Tensor) -> dict[int, torch.Tensor]:
    """By stride, the last activations before the resolution is halved next; [b, 3, h, w].

    AlexNet pads less than its strides need and has h / stride - 1 rows; 64 is its smallest size.
    """
    return model(image)


def pools(model: Plain, image: torch.Tensor) -> dict[int, torch.Tensor]:
    """By the stride they enter, the outputs of the pools."""
    return model.around_pools(image)[1]


def classifier_features(model: Plain, pooled: torch.Tensor) -> torch.Tensor:
    """What enters the last fully connected layer, from the last pool at the training size."""
    return model.classifier[:-1](pooled.flatten(1))
