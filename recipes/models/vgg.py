"""VGG-11, 13, 16 and 19 for 32 × 32 (Simonyan and Zisserman 2014), with one linear layer as the classifier.

The published classifier of three linear layers is made for 224 × 224 and 1,000 classes; on CIFAR the convolutions are
followed by one layer, as is usual in work on pruning. VGG-16 then has 14.7 M weights.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from recipes.models.registry import Request, register

# How many convolutions each of the five stages has.
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)


class CifarVGG(nn.Module):
    """3 × 3 convolutions, each with its activation, and a halving of the image after each of five stages.

    With BatchNorm the convolutions have no bias, since BatchNorm would subtract it again.
    """

    def __init__(self, request: Request, depth: int, batch_norm: bool) -> None:
        super().__init__()
        request.at_least(32, "five halvings")
        self.features = nn.Sequential()
        width, number = request.in_channels, 0
        for stage, (convolutions, published) in enumerate(zip(STAGES[depth], CHANNELS, strict=True), start=1):
            for _ in range(convolutions):
                number += 1
                out = request.channels(published)
                self.features.add_module(f"conv{number}", nn.Conv2d(width, out, 3, padding=1, bias=not batch_norm))
                if batch_norm:
                    self.features.add_module(f"bn{number}", nn.BatchNorm2d(out))
                self.features.add_module(f"act{number}", request.activation())
                width = out
            self.features.add_module(f"pool{stage}", nn.MaxPool2d(2))
        self.pool = nn.AdaptiveAvgPool2d(1)  # nothing to do at 32 × 32
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, request.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.features(x))))


for depth in STAGES:
    register(f"vgg{depth}")(functools.partial(CifarVGG, depth=depth, batch_norm=False))
    register(f"vgg{depth}-bn")(functools.partial(CifarVGG, depth=depth, batch_norm=True))
