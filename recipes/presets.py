"""Named experiments."""

from __future__ import annotations

from dataclasses import dataclass

from ap.names import unknown
from recipes.config import Experiment


@dataclass(frozen=True)
class Preset:
    """A named configuration, and a sentence on what it is for."""

    about: str
    experiment: Experiment


_CIFAR = {"data": "cifar10", "amount": 0.2, "rate": 0.02, "momentum": 0.9, "weight_decay": 5e-4}

PRESETS: dict[str, Preset] = {
    "quickstart": Preset(
        "handwritten digits from the package, a small CNN without BatchNorm; about a minute on two cores",
        Experiment(
            ap=("none", "lite"),
            model="cnn",
            data="digits",
            cycles=8,
            amount=0.36,
            rate=0.04,
            epochs=10,
            batch_size=50,
            lr=0.05,
            schedule="cosine",
            weight_decay=0.0,
            monitor_every=10,
        ),
    ),
    "lenet-fashion-mnist": Preset(
        "LeNet-300-100 on Fashion-MNIST, without BatchNorm: where AP's argument applies",
        Experiment(
            ap=("none", "lite", "pro", "pro:pruner"),
            model="lenet-300-100",
            data="fashion-mnist",
            cycles=10,
            amount=0.36,
            rate=0.04,
            epochs=3,
            batch_size=128,
            lr=0.1,
            schedule="linear",
            weight_decay=0.0,
        ),
    ),
    "resnet20-cifar10": Preset(
        "the published setting: ResNet-20, CIFAR-10, 50 epochs a training, 25 cycles",
        Experiment(
            ap=("none", "lite", "pro", "pro:pruner"),
            model="resnet20",
            cycles=25,
            epochs=50,
            batch_size=64,
            lr=0.1,
            warmup="20000it",
            schedule="steps",
            milestones=("25ep", "32ep"),
            **_CIFAR,  # type: ignore[arg-type]
        ),
    ),
    "resnet20-cifar10-fast": Preset(
        "the same network in ten epochs a training and ten larger cycles",
        Experiment(
            ap=("none", "lite", "pro", "pro:pruner"),
            model="resnet20",
            cycles=10,
            epochs=10,
            batch_size=128,
            lr=0.2,
            warmup="1ep",
            schedule="linear",
            **(_CIFAR | {"amount": 0.36, "rate": 0.04}),  # type: ignore[arg-type]
        ),
    ),
}


def get(name: str) -> Preset:
    """The preset of this name; ValueError with the close names for others."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]
