"""ResNet-20 … 110 for CIFAR (He et al. 2015, section 4.2)."""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from recipes.models.registry import Request, register


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zeros for the new channels. No parameters."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.before, self.after = new_channels // 2, new_channels - new_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut; the second activation follows the addition."""

    def __init__(self, request: Request, width: int, out: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.act1 = request.activation()
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width != out:
            self.shortcut = (
                PadShortcut(stride, out - width)
                if shortcut == "A"
                else nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            )
        self.act2 = request.activation()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(out)) + self.shortcut(x))


def _stage(request: Request, width: int, out: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = Block(request, width, out, stride, shortcut)
    return nn.Sequential(first, *(Block(request, out, out, 1, shortcut) for _ in range(blocks - 1)))


class CifarResNet(nn.Module):
    """Depth 6n + 2: a convolution, three stages of n blocks with 16, 32 and 64 channels, a linear classifier.

    `shortcut` "A" (the default, as published for CIFAR: no parameters) or "B" (1 × 1 convolution and BatchNorm where
    the shape changes, which is prunable).
    """

    def __init__(self, request: Request, depth: int, shortcut: str = "A") -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"resnet{depth}: shortcut must be 'A' or 'B', not {shortcut!r}")
        one, two, four = request.channels(16), request.channels(32), request.channels(64)
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(request.in_channels, one, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(one)
        self.act1 = request.activation()
        self.layer1 = _stage(request, one, one, blocks, 1, shortcut)
        self.layer2 = _stage(request, one, two, blocks, 2, shortcut)
        self.layer3 = _stage(request, two, four, blocks, 2, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(four, request.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.flatten(self.pool(x)))


for depth in (20, 32, 44, 56, 110):
    register(f"resnet{depth}")(functools.partial(CifarResNet, depth=depth))
