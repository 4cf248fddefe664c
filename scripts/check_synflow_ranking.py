"""Accuracy after pruning a small VGG at initialisation to 1 %: SynFlow, magnitude and random on CIFAR-10.

    python scripts/check_synflow_ranking.py --seeds 3

The setting is small enough for a CPU: VGG-11 with BatchNorm at a quarter of its width, 8,000 training images, the
whole test set. It shows the order of the methods; the published accuracies need the whole training set and a GPU.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pruners
from ap.masks import Masks
from recipes import models
from recipes.data import load

METHODS = ("synflow", "magnitude", "random")


def train_and_test(method: str, seed: int, images: int, epochs: int, density: float, width: float) -> float:
    """Test accuracy in percent of a VGG pruned at initialisation and trained."""
    data = load("cifar10")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))

    def prepared(raw: Tensor) -> Tensor:
        return (raw.float() - mean) / std

    torch.manual_seed(seed)
    model = models.create("vgg11-bn", width=width)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # as in the experiments of SynFlow's authors
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    masks = Masks(model)
    options = {"example_input": torch.zeros(1, 3, 32, 32)} if method == "synflow" else {}
    options |= {"seed": seed} if method == "random" else {}
    pruners.create(method, **options).prune(model, masks, amount=1 - density)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train.labels), generator=generator)[:images]
    inputs, labels = prepared(data.train.images[chosen]), data.train.labels[chosen]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    masks.bind(optimizer)
    steps = epochs * (images // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(images, generator=generator)
        for batch in order[: images // 128 * 128].split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(_flipped(inputs[batch], generator)), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return _accuracy(model, prepared(data.test.images), data.test.labels)


def _flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    flip = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(flip, images.flip(3), images)


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return 100 * right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=8_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--width", type=float, default=0.25)
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for method in METHODS:
        start = time.perf_counter()
        runs = [
            train_and_test(method, seed, options.images, options.epochs, options.density, options.width)
            for seed in range(options.seeds)
        ]
        spread = statistics.stdev(runs) if len(runs) > 1 else float("nan")
        seconds = time.perf_counter() - start
        print(
            f"{method:<10} {statistics.mean(runs):6.2f} ± {spread:.2f} %   "
            f"{', '.join(f'{run:.2f}' for run in runs)}   {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
