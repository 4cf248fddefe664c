"""The presets: what they promise, and that each of them can be trained."""

import dataclasses

import pytest
import torch

from recipes import experiment, presets
from recipes.config import Experiment
from recipes.data import ImageData, ImageSet
from recipes.engine import Engine, Stopped

GRID = ["magnitude", "gradient", "lamp", "lookahead", "synflow"]
ARMS = ("none", "lite", "pro", "pro:pruner")
FAST = [name for name in presets.PRESETS if name.endswith("-fast")]


def test_the_grid_is_there():
    for name in (
        "resnet20-cifar10",
        "vgg19-cifar10",
        "densenet40-cifar100",
        "mobilenetv2-cifar100",
        "vit-cifar10",
        "vit-relu-cifar10",
        "resnet50-tiny-imagenet",
        "vit-b-16-tiny-imagenet",
    ):
        for full in (name, f"{name}-fast"):
            assert presets.get(full).experiment.ap == ARMS
            assert name.endswith(presets.get(full).experiment.data)


def test_the_published_setting():
    """The released script's: see the preset's own sentence."""
    config = presets.get("resnet20-cifar10").experiment
    assert (config.batch_size, config.momentum, config.weight_decay) == (64, 0.9, 5e-4)
    assert (config.lr, config.warmup, config.schedule, config.milestones) == (0.1, "20000it", "steps", ("25ep", "32ep"))
    assert (config.epochs, config.cycles, config.amount, config.rate) == (50, 25, 0.2, 0.02)
    vgg = presets.get("vgg19-cifar10").experiment
    assert (vgg.epochs, vgg.milestones, vgg.gamma) == (160, ("80ep", "120ep"), 0.1)


@pytest.mark.parametrize("name", FAST)
def test_fast_ones_ask_the_same_question(name):
    fast, full = presets.get(name).experiment, presets.get(name.removesuffix("-fast")).experiment
    for field in ("model", "activation", "data", "ap", "optimizer", "rewind", "weight_decay"):
        assert getattr(fast, field) == getattr(full, field), field
    assert fast.epochs == 10
    assert fast.cycles <= full.cycles
    # AP takes the same part of what a cycle removes, to within a fifth.
    assert fast.rate / fast.amount == pytest.approx(full.rate / full.amount, rel=0.2)


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_every_pruner_of_the_grid_goes_with_every_preset(name):
    for pruner in GRID:
        experiment.check(dataclasses.replace(presets.get(name).experiment, pruner=pruner))


@pytest.mark.parametrize("name", [name for name in presets.PRESETS if name.endswith(("cifar10", "cifar100"))])
def test_every_pruner_of_the_grid_scores_the_presets_models(name):
    """Or is refused before anything is trained: SynFlow has no meaning through attention."""
    base = dataclasses.replace(presets.get(name).experiment, width=0.25, batch_size=8, device="cpu")
    data = some_images(base)
    for pruner in GRID:
        config = dataclasses.replace(base, pruner=pruner)
        if name.startswith("vit") and pruner == "synflow":
            with pytest.raises(ValueError, match=r"the pruner synflow cannot prune vit-mini: .*scaled_dot_product"):
                experiment.rehearse(config, data)
        else:
            experiment.rehearse(config, data)


def some_images(config: Experiment) -> ImageData:
    """Random images of the data set's shape."""
    channels, side, classes = {
        "digits": (1, 8, 10),
        "fashion-mnist": (1, 28, 10),
        "cifar10": (3, 32, 10),
        "cifar100": (3, 32, 100),
        "tiny-imagenet": (3, 64, 200),
    }[config.data]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, channels, side, side), dtype=torch.uint8, generator=generator)
    part = ImageSet(images, torch.arange(8) % classes)
    names = tuple(str(number) for number in range(classes))
    return ImageData(config.data, part, part, part, names, (127.0,) * channels, (74.0,) * channels, "crop-flip")


@pytest.mark.parametrize(
    "name",
    [
        # ViT-B/16 takes seconds a step, and ResNet-50 nearly one.
        pytest.param(name, marks=pytest.mark.slow) if name.startswith("vit-b") else name
        for name in presets.PRESETS
        if not name.endswith("-fast") or name == "resnet20-cifar10-fast"
    ],
)
def test_every_preset_makes_a_step(name):
    config = presets.get(name).experiment
    width = {"width": 0.25} if not config.model.startswith("torchvision/") else {}
    config = dataclasses.replace(config, batch_size=4, device="cpu", **width)
    data = some_images(config)
    engine = Engine(config, data, 0)
    model = engine.prepare(experiment.build(config, data, 0))
    before = {key: value.clone() for key, value in model.named_parameters()}

    def once(step: int) -> None:
        raise Stopped

    training = engine.training(model, 0, 0)
    with pytest.raises(Stopped):
        training.run_epoch(once)
    moved = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    assert len(moved) > len(before) / 2
    assert all(torch.isfinite(value).all() for value in model.parameters())
