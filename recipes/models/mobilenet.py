"""MobileNet-V2 for 32 × 32 (Sandler et al. 2018): the published network without its first two halvings of the image."""

from __future__ import annotations

from torch import Tensor, nn

from recipes.models.registry import Request, register

# Expansion, channels, blocks, stride of the first: table 2 of the paper, with stride 1 for the second row.
ROWS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _convolution(
    request: Request, width: int, out: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    block = nn.Sequential()
    block.add_module("conv", nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=False))
    block.add_module("bn", nn.BatchNorm2d(out))
    block.add_module("act", request.activation())
    return block


class InvertedResidual(nn.Module):
    """Widen (1 × 1), filter each channel (3 × 3), narrow (1 × 1, linear); a shortcut where the shape stays."""

    def __init__(self, request: Request, width: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        self.expand = _convolution(request, width, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _convolution(request, hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Conv2d(hidden, out, 1, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.keeps_shape = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.project(self.depthwise(self.expand(x))))
        return x + y if self.keeps_shape else y


class CifarMobileNetV2(nn.Module):
    """Seventeen inverted residuals between a 3 × 3 and a 1 × 1 convolution, and a linear classifier."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        width = request.channels(32)
        self.stem = _convolution(request, request.in_channels, width, 3)
        self.blocks = nn.Sequential()
        for expansion, published, count, first in ROWS:
            out = request.channels(published)
            for index in range(count):
                self.blocks.append(InvertedResidual(request, width, out, 1 if index else first, expansion))
                width = out
        last = request.channels(1280)
        self.head = _convolution(request, width, last, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(last, request.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.fc(self.flatten(self.pool(x)))


register("mobilenetv2", activation="relu6")(CifarMobileNetV2)
