"""Two networks that train in seconds: a CNN for small images and LeNet-300-100."""

from __future__ import annotations

from torch import Tensor, nn

from recipes.models.registry import Request, register


class SmallCNN(nn.Module):
    """Two convolutions, one hidden layer, no normalisation.

    Without BatchNorm a neuron's pre-activation is the plain weighted sum of non-negative inputs, which is the case
    that Activate-while-Pruning argues about: removing a negative weight can only raise it.
    """

    def __init__(self, request: Request) -> None:
        super().__init__()
        c1, c2, hidden = request.channels(16), request.channels(32), request.channels(64)
        side = request.image_size // 4
        if side < 1:
            raise ValueError(f"cnn: image_size must be at least 4, not {request.image_size}")
        self.conv1 = nn.Conv2d(request.in_channels, c1, 3, padding=1)
        self.act1 = request.activation()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(c1, c2, 3, padding=1)
        self.act2 = request.activation()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(c2 * side * side, hidden)
        self.act3 = request.activation()
        self.fc2 = nn.Linear(hidden, request.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.act1(self.conv1(x)))
        x = self.pool2(self.act2(self.conv2(x)))
        x = self.act3(self.fc1(self.flatten(x)))
        return self.fc2(x)


class LeNet300(nn.Module):
    """LeNet-300-100 (LeCun et al. 1998): two hidden layers on the flattened image."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        first, second = request.channels(300), request.channels(100)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(request.in_channels * request.image_size**2, first)
        self.act1 = request.activation()
        self.fc2 = nn.Linear(first, second)
        self.act2 = request.activation()
        self.fc3 = nn.Linear(second, request.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.fc1(self.flatten(x)))
        return self.fc3(self.act2(self.fc2(x)))


register("cnn")(SmallCNN)
register("lenet-300-100")(LeNet300)
