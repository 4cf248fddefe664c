"""Named experiments.

Settings that the released script of AP or its authors' other code fixes are taken from there (ResNet-20, and the epochs
and milestones of VGG-19); the others are this project's. A `-fast` preset asks the same question in about ten epochs a
training and fewer, larger cycles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ap.names import unknown
from recipes.config import Experiment


@dataclass(frozen=True)
class Preset:
    """A named configuration, and a sentence on what it is for."""

    about: str
    experiment: Experiment


_ALL = ("none", "lite", "pro", "pro:pruner")
# 36 % a cycle are nearly two cycles of 20 %; AP's part is a ninth of it, as 2 % of 20 % nearly are.
_FAST: dict[str, Any] = {"amount": 0.36, "rate": 0.04, "warmup": "1ep"}


def _sgd(**settings: Any) -> Experiment:
    published: dict[str, Any] = {
        "ap": _ALL,
        "amount": 0.2,
        "rate": 0.02,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }
    return Experiment(**(published | settings))


def _adamw(**settings: Any) -> Experiment:
    """For transformers: they are trained with AdamW, a warm-up, a cosine, smoothed labels and clipped gradients."""
    usual: dict[str, Any] = {
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.05,
        "schedule": "cosine",
        "label_smoothing": 0.1,
        "clip_norm": 1.0,
    }
    return _sgd(**(usual | settings))


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
            ap=_ALL,
            model="lenet-300-100",
            data="fashion-mnist",
            inputs="non-negative",
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
    # --- CIFAR ------------------------------------------------------------------------------------------------------
    "resnet20-cifar10": Preset(
        "the published setting: ResNet-20, CIFAR-10, 50 epochs a training, 25 cycles",
        _sgd(
            model="resnet20",
            data="cifar10",
            cycles=25,
            epochs=50,
            batch_size=64,
            warmup="20000it",
            schedule="steps",
            milestones=("25ep", "32ep"),
        ),
    ),
    "resnet20-cifar10-fast": Preset(
        "the same network in ten epochs a training and ten larger cycles",
        _sgd(
            model="resnet20",
            data="cifar10",
            cycles=10,
            epochs=10,
            batch_size=128,
            lr=0.2,
            schedule="linear",
            **_FAST,
        ),
    ),
    "vgg19-cifar10": Preset(
        "VGG-19 with BatchNorm, CIFAR-10, 160 epochs with drops at 80 and 120",
        _sgd(
            model="vgg19-bn",
            data="cifar10",
            cycles=25,
            epochs=160,
            batch_size=64,
            schedule="steps",
            milestones=("80ep", "120ep"),
        ),
    ),
    "vgg19-cifar10-fast": Preset(
        "the same network in ten epochs a training and ten larger cycles",
        _sgd(
            model="vgg19-bn",
            data="cifar10",
            cycles=10,
            epochs=10,
            batch_size=128,
            schedule="linear",
            **_FAST,
        ),
    ),
    "densenet40-cifar100": Preset(
        "DenseNet-40, CIFAR-100, 80 epochs with drops at a half and three quarters",
        _sgd(
            model="densenet40",
            data="cifar100",
            cycles=20,
            epochs=80,
            batch_size=64,
            nesterov=True,
            weight_decay=1e-4,
            schedule="steps",
            milestones=("40ep", "60ep"),
        ),
    ),
    "densenet40-cifar100-fast": Preset(
        "the same network in ten epochs a training and ten larger cycles",
        _sgd(
            model="densenet40",
            data="cifar100",
            cycles=10,
            epochs=10,
            batch_size=128,
            lr=0.2,
            nesterov=True,
            weight_decay=1e-4,
            schedule="linear",
            **_FAST,
        ),
    ),
    "mobilenetv2-cifar100": Preset(
        "MobileNet-V2 with ReLU6, CIFAR-100, 80 epochs with a cosine",
        _sgd(
            model="mobilenetv2",
            data="cifar100",
            cycles=20,
            epochs=80,
            batch_size=128,
            warmup="1ep",
            schedule="cosine",
        ),
    ),
    "mobilenetv2-cifar100-fast": Preset(
        "the same network in ten epochs a training and ten larger cycles",
        _sgd(
            model="mobilenetv2",
            data="cifar100",
            cycles=10,
            epochs=10,
            batch_size=128,
            schedule="linear",
            **_FAST,
        ),
    ),
}


def _transformer(activation: str, about: str) -> dict[str, Preset]:
    """A small vision transformer on CIFAR-10, and its fast version."""
    name = "vit-cifar10" if activation == "gelu" else f"vit-{activation}-cifar10"
    common = {"model": "vit-mini", "activation": activation, "data": "cifar10", "batch_size": 128}
    return {
        name: Preset(about, _adamw(cycles=20, epochs=100, warmup="5ep", mixup=0.2, **common)),
        f"{name}-fast": Preset(
            "the same network in ten epochs a training and ten larger cycles",
            _adamw(cycles=10, epochs=10, **common, **_FAST),
        ),
    }


PRESETS |= _transformer("gelu", "a small vision transformer with GELU, where no layer satisfies AP's argument")
PRESETS |= _transformer("relu", "the same transformer with ReLU: the positive control for the one with GELU")

# --- folders of images ----------------------------------------------------------------------------------------------
# Deep networks find no trainable subnetwork at their very first weights; two epochs in, they do (Frankle et al. 2020).
_FOLDER: dict[str, Any] = {
    "data": "tiny-imagenet",
    "augment": "resized-crop",
    "crop_area": 0.25,  # of a small image even a small part is needed
    "label_smoothing": 0.1,
    "batch_size": 128,
    "rewind": "2ep",
}
_RESNET50 = {"model": "torchvision/resnet50", "weight_decay": 1e-4, "nesterov": True, **_FOLDER}
_VIT_B_16 = {"model": "torchvision/vit_b_16", **_FOLDER, "lr": 5e-4}

PRESETS |= {
    "resnet50-tiny-imagenet": Preset(
        "torchvision's ResNet-50, Tiny-ImageNet (or --data FOLDER --image-size 224)",
        _sgd(cycles=10, epochs=90, warmup="5ep", schedule="cosine", **_RESNET50),
    ),
    "resnet50-tiny-imagenet-fast": Preset(
        "the same network in ten epochs a training and five larger cycles",
        _sgd(cycles=5, epochs=10, schedule="linear", **_RESNET50, **_FAST),
    ),
    "vit-b-16-tiny-imagenet": Preset(
        "torchvision's ViT-B/16, Tiny-ImageNet at 64 × 64: sixteen patches",
        _adamw(cycles=10, epochs=90, warmup="5ep", mixup=0.2, **_VIT_B_16),
    ),
    "vit-b-16-tiny-imagenet-fast": Preset(
        "the same network in ten epochs a training and five larger cycles",
        _adamw(cycles=5, epochs=10, **_VIT_B_16, **_FAST),
    ),
}


def get(name: str) -> Preset:
    """The preset of this name; ValueError with the close names for others."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]


def split(command: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The preset that a command line begins with, and the rest of it; --help alone explains the quickstart's options.

    >>> split("run", ["quickstart", "--seeds", "2"])
    ('quickstart', ['--seeds', '2'])
    """
    if arguments and arguments[0] in ("-h", "--help"):
        return "quickstart", arguments
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"{command} needs a preset first: {', '.join(PRESETS)}")
    return arguments[0], arguments[1:]
