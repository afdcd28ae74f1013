"""The project's small nets: LeNet and ResNet-18 for 28x28 grey images; ResNet, VGG, DenseNet for 32x32 colour.

Each takes *normalised* images [N, C, S, S] and returns logits [N, num_classes], or, with `num_classes=0`, the features
[N, D] before the classifier. `SMALL_NETS` says which exist, with the pixel statistics the published training codes use:
those differ (standard deviation .2023/.1994/.2010 in the smoothing codes' ResNets, .247/.243/.261 in "Hold me tight!"),
so each net keeps its own. They start as there too: He's normal numbers in the smoothing codes' ResNets and in VGG,
torch's own initialisation in the others.

Sources: LeCun et al. 1998 with ReLU and max-pooling; He et al. 2016 (arXiv:1512.03385) §4.2 for the 6n+2-layer ResNets,
here with a convolution on every shortcut that changes shape; Simonyan & Zisserman (arXiv:1409.1556), without and with
BatchNorm; Huang et al. (arXiv:1608.06993), growth 32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _classifier(features: int, num_classes: int) -> nn.Module:
    return nn.Linear(features, num_classes) if num_classes else nn.Identity()


def _he_normal(net: nn.Module) -> None:
    """Convolutions as He et al. 2015 draw them, for the fan-out. Without it a VGG-19 without BatchNorm does not train:
    torch's own bounds shrink its maps to a sixth of their variance in each layer.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class LeNet(nn.Module):
    """Two 5x5 convolutions and three linear layers, 84 features; [N, 1, 28, 28]."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = _classifier(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.max_pool2d(F.relu(self.conv1(images)), 2)
        maps = F.max_pool2d(F.relu(self.conv2(maps)), 2)
        hidden = F.relu(self.fc1(maps.flatten(1)))
        return self.fc3(F.relu(self.fc2(hidden)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
            if stride != 1 or channels_in != channels
            else nn.Identity()
        )

    def forward(self, maps: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps)))))
        return F.relu(residual + self.downsample(maps))


class CifarResNet(nn.Module):
    """ResNet with a 3x3 stem and no max-pooling; stage i is `layer{i}`, halving the resolution from the second on.

    blocks: basic blocks per stage. widths: channels per stage; the last one is the feature dimension.
    """

    def __init__(self, blocks: Sequence[int], widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        self.stages = len(blocks)
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            strides = [1 if stage == 1 else 2] + [1] * (count - 1)
            layer = nn.Sequential()
            for stride in strides:
                layer.append(BasicBlock(channels, width, stride))
                channels = width
            self.add_module(f"layer{stage}", layer)
        self.fc = _classifier(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.bn1(self.conv1(images)))
        for stage in range(1, self.stages + 1):
            maps = self.get_submodule(f"layer{stage}")(maps)
        return self.fc(maps.mean((2, 3)))


class Vgg19(nn.Module):
    """Sixteen 3x3 convolutions, five max-poolings down to 1x1, three linear layers with dropout; 512 features.

    The classifier is that of "Hold me tight!": two hidden layers of 512, each with ReLU and dropout of one half.
    """

    def __init__(self, num_classes: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = 3
        for width, convolutions in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(convolutions):
                self.features.append(nn.Conv2d(channels, width, 3, padding=1))
                if batch_norm:
                    self.features.append(nn.BatchNorm2d(width))
                self.features.append(nn.ReLU())
                channels = width
            self.features.append(nn.MaxPool2d(2))
        hidden = [layer for _ in range(2) for layer in (nn.Linear(channels, channels), nn.ReLU(), nn.Dropout())]
        self.classifier = nn.Sequential(*hidden, _classifier(channels, num_classes))
        _he_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class DenseLayer(nn.Module):
    """BN-ReLU-1x1 (to 4 times the growth), BN-ReLU-3x3 (to the growth), put before its input along the channels."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(maps))))))
        return torch.cat([new, maps], dim=1)


class Transition(nn.Module):
    """BN-ReLU-1x1 to half the channels, then 2x2 average pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(maps))), 2)


class DenseNet121(nn.Module):
    """DenseNet-BC of 6, 12, 24 and 16 layers with a 3x3 stem; 1,024 features."""

    def __init__(self, num_classes: int, growth: int = 32) -> None:
        super().__init__()
        channels = 2 * growth
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.dense = nn.Sequential()
        for block, layers in enumerate((6, 12, 24, 16)):
            if block:
                self.dense.append(Transition(channels))
                channels //= 2
            for _ in range(layers):
                self.dense.append(DenseLayer(channels, growth))
                channels += growth
        self.bn = nn.BatchNorm2d(channels)
        self.classifier = _classifier(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.bn(self.dense(self.stem(images))))
        return self.classifier(maps.mean((2, 3)))


@dataclass(frozen=True)
class SmallNet:
    """`build(num_classes)` makes the net; `classifier` names its last layer; mean, std: of pixels in [0, 1]."""

    build: Callable[[int], nn.Module]
    feature_dim: int
    classifier: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


_MNIST_MEAN, _MNIST_STD = (0.1307,), (0.3081,)
_CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
_SMOOTHING_STD = (0.2023, 0.1994, 0.2010)
_MARGINS_STD = (0.247, 0.243, 0.261)


def _thin_resnet(depth: int) -> SmallNet:
    def build(num_classes: int) -> nn.Module:
        net = CifarResNet([(depth - 2) // 6] * 3, (16, 32, 64), num_classes)
        _he_normal(net)
        return net

    return SmallNet(build, 64, "fc", 32, _CIFAR_MEAN, _SMOOTHING_STD)


def _resnet18(num_classes: int) -> nn.Module:
    return CifarResNet((2, 2, 2, 2), (64, 128, 256, 512), num_classes)


def _mnist_resnet18(num_classes: int) -> nn.Module:
    """torchvision's ResNet-18 with its 7x7 stem and max-pooling, for one channel: 28x28 pixels end as 1x1 maps."""
    from torchvision.models import resnet18  # not at the top: half a second that the other nets need not wait for

    net = resnet18(num_classes=num_classes or 1)
    net.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    if not num_classes:
        net.fc = nn.Identity()
    return net


SMALL_NETS = {
    "lenet": SmallNet(LeNet, 84, "fc3", 28, _MNIST_MEAN, _MNIST_STD),
    "mnist_resnet18": SmallNet(_mnist_resnet18, 512, "fc", 28, _MNIST_MEAN, _MNIST_STD),
    **{f"cifar_resnet{depth}": _thin_resnet(depth) for depth in (20, 32, 44, 56, 110)},
    "cifar_resnet18": SmallNet(_resnet18, 512, "fc", 32, _CIFAR_MEAN, _MARGINS_STD),
    "vgg19": SmallNet(partial(Vgg19, batch_norm=False), 512, "classifier.6", 32, _CIFAR_MEAN, _MARGINS_STD),
    "vgg19_bn": SmallNet(partial(Vgg19, batch_norm=True), 512, "classifier.6", 32, _CIFAR_MEAN, _MARGINS_STD),
    "densenet121": SmallNet(DenseNet121, 1024, "classifier", 32, _CIFAR_MEAN, _MARGINS_STD),
}
