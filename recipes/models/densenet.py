"""DenseNet-40 with growth rate 12 for CIFAR (Huang et al. 2016), without bottlenecks or compression."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recipes.models.registry import Request, register


class DenseLayer(nn.Module):
    """BatchNorm, activation, 3 × 3 convolution; its output joins its input."""

    def __init__(self, request: Request, width: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.act = request.activation()
        self.conv = nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.act(self.bn(x)))], 1)


class Transition(nn.Module):
    """BatchNorm, activation, 1 × 1 convolution, and the mean of 2 × 2 pixels."""

    def __init__(self, request: Request, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.act = request.activation()
        self.conv = nn.Conv2d(width, width, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.act(self.bn(x))))


class DenseNet40(nn.Module):
    """Three blocks of twelve dense layers, two transitions, a linear classifier: 1.0 M weights."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        request.at_least(4, "two halvings")
        growth, width = request.channels(12), request.channels(16)
        self.conv = nn.Conv2d(request.in_channels, width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential()
        for number in (1, 2, 3):
            layers = [DenseLayer(request, width + index * growth, growth) for index in range(12)]
            self.blocks.add_module(f"block{number}", nn.Sequential(*layers))
            width += 12 * growth
            if number < 3:
                self.blocks.add_module(f"transition{number}", Transition(request, width))
        self.bn = nn.BatchNorm2d(width)
        self.act = request.activation()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, request.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.blocks(self.conv(x))))
        return self.fc(self.flatten(self.pool(x)))


register("densenet40")(DenseNet40)
