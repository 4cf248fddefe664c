"""Swish and others against ReLU as networks get deeper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from ap import activations
from recipes.studies import images, intervals
from recipes.studies.base import Data, Journal, Study, Table, Verdict, above, register
from recipes.studies.quadrature import gain
from recipes.studies.stacked import SGD, Stack, accuracy, fit, warmup_cosine

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@register("swish-depth")
@dataclass(frozen=True, kw_only=True)
class SwishDepth(Study):
    """Test accuracy by depth, without normalisation or shortcuts, for Swish, ReLU and others."""

    title: ClassVar[str] = "Swish and depth"
    claim: ClassVar[str] = "The deeper the network, the more Swish gains over ReLU (Ramachandran, Zoph & Le 2017)."
    setting: ClassVar[str] = (
        "Fully connected networks of constant width, without normalisation or shortcuts, initialised with each "
        "activation's own gain; gradient descent with momentum, clipped gradients, warm-up and cosine. Every "
        "activation and depth has its learning rate chosen on validation images from the same list; all rates and "
        "seeds train as one stack. Differences to ReLU are paired by seed."
    )

    data: str = "digits"
    """Data set."""
    names: tuple[str, ...] = ("relu", "silu", "gelu", "smelu", "tanh")
    """Activations; silu is Swish with β = 1."""
    depths: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Hidden layers."""
    width: int = 48
    """Units a layer."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Learning rates to choose from."""
    seeds: int = 5
    """Networks for each rate."""
    steps: int = 400
    """Steps of each training."""

    @classmethod
    def quick(cls, **options: object) -> SwishDepth:
        small = {"names": ("relu", "silu"), "depths": (2, 8, 16), "rates": (0.1, 0.3), "seeds": 3, "steps": 150}
        return cls(**{**small, "width": 32, **options})  # type: ignore[arg-type]

    def measure(self, journal: Journal) -> Data:
        if "relu" not in self.names:
            raise ValueError(f"names must contain relu, which the others are compared with: {', '.join(self.names)}")
        cells = {
            f"{name}/{depth}": journal.cell(f"{name}/{depth}", self._cell, name, depth)
            for depth in self.depths
            for name in self.names
        }
        return {"names": list(self.names), "depths": list(self.depths), "cells": cells}

    def _cell(self, name: str, depth: int) -> Data:
        data = images.load(self.data)
        seeds = [self.seed + i for i in range(self.seeds)]
        factor = gain(activations.create(name))
        inputs = data.in_channels * data.image_size**2

        def build(seed: int) -> nn.Module:
            generator = torch.Generator().manual_seed(seed)
            widths = [inputs, *[self.width] * depth, data.num_classes]
            layers: list[nn.Module] = [nn.Flatten()]
            for i in range(depth + 1):
                layer = nn.Linear(widths[i], widths[i + 1])
                # The first layer's inputs are normalised images, the others' are activations.
                scale = (1.0 if i == 0 else factor) / widths[i] ** 0.5
                nn.init.normal_(layer.weight, std=scale, generator=generator)
                nn.init.zeros_(layer.bias)
                layers += [layer, activations.create(name)] if i < depth else [layer]
            return nn.Sequential(*layers)

        stack = Stack([build(seed) for seed in seeds] * len(self.rates))
        rates = torch.tensor(self.rates).repeat_interleave(len(seeds))
        schedule: Callable[[float], float] = warmup_cosine()
        optimizer = SGD(stack.params, rates, 0.9, clip=0.5)
        every = seeds * len(self.rates)
        fit(stack, optimizer, *data.train, every, steps=self.steps, batch=64, schedule=schedule)
        n = len(seeds)
        val = torch.tensor(accuracy(stack, *data.val)).view(-1, n).mean(1)
        best = int(val.argmax())
        return {"rate": self.rates[best], "accuracy": accuracy(stack, *data.test)[best * n : (best + 1) * n]}

    @classmethod
    def tables(cls, data: Data) -> list[Table]:
        rows, versus = [], []
        for name in data["names"]:
            cells = [data["cells"][f"{name}/{depth}"] for depth in data["depths"]]
            rows.append([name, *(f"{intervals.mean(c['accuracy']).text(1)}, rate {c['rate']:g}" for c in cells)])
            if name != "relu":
                versus.append([name, *(_gain(data, name, depth).text(1) for depth in data["depths"])])
        columns = ["activation", *(f"{depth} layers" for depth in data["depths"])]
        return [
            Table("Test accuracy, %, and the rate chosen", columns, rows),
            Table("Against ReLU, points", columns, versus),
        ]

    @classmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        first, last = data["depths"][0], data["depths"][-1]
        found = []
        for name in (name for name in data["names"] if name != "relu"):
            deep = _gain(data, name, last)
            a, b = data["cells"][f"{name}/{last}"]["accuracy"], data["cells"][f"relu/{last}"]["accuracy"]
            c, d = data["cells"][f"{name}/{first}"]["accuracy"], data["cells"][f"relu/{first}"]["accuracy"]
            growth = intervals.mean([(w - x) - (y - z) for w, x, y, z in zip(a, b, c, d, strict=True)])
            found.append(above(f"{name} beats ReLU at {last} layers", deep, f"{deep.text(1)} points"))
            claim = f"{name}'s gain over ReLU grows from {first} to {last} layers"
            found.append(above(claim, growth, f"by {growth.text(1)} points"))
        return found

    @classmethod
    def plot(cls, data: Data, figure: Figure) -> None:
        axes = figure.subplots()
        for name in data["names"]:
            points = [intervals.mean(data["cells"][f"{name}/{depth}"]["accuracy"]) for depth in data["depths"]]
            errors = [[p.mean - p.low for p in points], [p.high - p.mean for p in points]]
            axes.errorbar(data["depths"], [p.mean for p in points], yerr=errors, marker="o", capsize=3, label=name)
        axes.set(xlabel="hidden layers", ylabel="test accuracy, %", xscale="log", ylim=(None, 101))
        axes.set_xticks(data["depths"], [str(depth) for depth in data["depths"]])
        axes.legend()


def _gain(data: Data, name: str, depth: int) -> intervals.Interval:
    return intervals.paired(data["cells"][f"{name}/{depth}"]["accuracy"], data["cells"][f"relu/{depth}"]["accuracy"])
