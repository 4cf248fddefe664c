"""Every activation on one residual network: the same seeds and budget, dense and pruned, with and without AP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from ap import activations
from recipes import models
from recipes.studies import images, intervals
from recipes.studies.base import Data, Journal, Study, Table, Verdict, above, register
from recipes.studies.lockstep import Arm, Plan, prune, values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = (Arm("none"), Arm("AP", "least-moved-negative"))
SMOOTH = ("gelu", "silu", "mish", "smelu", "helu")


@register("activations")
@dataclass(frozen=True, kw_only=True)
class Activations(Study):
    """A sweep over all registered activations on a residual network, dense and pruned."""

    title: ClassVar[str] = "Every activation on one residual network"
    claim: ClassVar[str] = (
        "Smooth activations are more accurate than ReLU on residual networks: GELU most of all (Lee 2023: 89.52 % "
        "on CIFAR-10 after 20 epochs, Hardswish 88.77, ReLU6 88.70, Sigmoid 33.90)."
    )
    setting: ClassVar[str] = (
        "A narrow ResNet-20 with BatchNorm for each activation at its default parameters, with the same seeds, "
        "data, steps, learning rate and clipped gradients; then magnitude pruning with rewinding to a low density,"
        " without AP and with it at equal density. Seeds and arms of an activation train as one stack. Differences"
        " are paired by seed; no correction is made for the number of activations, so the best of many is "
        "flattered."
    )

    data: str = "digits"
    """Data set."""
    names: tuple[str, ...] = ()
    """Activations; all registered ones if none is given."""
    model: str = "resnet20"
    """A model of recipes.models."""
    width: float = 0.25
    """Its width."""
    seeds: int = 3
    """Networks an arm."""
    steps: int = 120
    """Steps of each training."""
    cycles: int = 2
    """Prunings, each of 60 % of what is alive."""

    @classmethod
    def quick(cls, **options: object) -> Activations:
        small = {"names": ("relu", "gelu", "silu", "sigmoid"), "seeds": 2, "steps": 40, "cycles": 1}
        return cls(**{**small, **options})  # type: ignore[arg-type]

    def measure(self, journal: Journal) -> Data:
        names = self.names or tuple(name for name in activations.names() if name != "formula")
        if "relu" not in names:
            raise ValueError(f"names must contain relu, which the others are compared with: {', '.join(names)}")
        return {name: journal.cell(name, self._cell, name) for name in names}

    def _cell(self, name: str) -> list[Data]:
        data = images.load(self.data)
        seeds = [self.seed + i for i in range(self.seeds)]

        def build(seed: int) -> nn.Module:
            torch.manual_seed(seed)
            size = (data.num_classes, data.in_channels, data.image_size)
            return models.create(self.model, *size, activation=name, width=self.width)

        plan = Plan(self.steps, 64, 0.1, 0.9, 5e-4, self.cycles, amount=0.6, share=0.06, clip=1.0)
        rows = prune(build, ARMS, seeds, data, plan)
        return [{key: value for key, value in row.items() if key != "layers"} for row in rows]

    @classmethod
    def tables(cls, data: Data) -> list[Table]:
        last = max(row["cycle"] for row in data["relu"])
        density = values(data["relu"], "density", arm="none", cycle=last)[0]
        rows = []
        for name in sorted(data, key=lambda n: -_accuracy(data, n, "none", 0).mean):
            columns = [("none", 0), ("none", last), ("AP", last)]
            cells = [_accuracy(data, name, arm, cycle).text(1) for arm, cycle in columns]
            dead = values(data[name], "total", arm="none", cycle=0)
            rate = "cannot die" if None in dead else f"{100 * intervals.mean(dead).mean:.1f}"
            versus = "–" if name == "relu" else _against(data, name, "relu", 0).text(1)
            pruned = [values(data[name], "accuracy", arm=arm, cycle=last) for arm in ("AP", "none")]
            ap = intervals.paired(*pruned)
            rows.append([name, cells[0], versus, *cells[1:], ap.text(1), rate])
        header = ["activation", "dense, %", "against ReLU", "pruned, %", "with AP, %", "AP's effect", "DNR dense, %"]
        title = f"Test accuracy, dense and at {100 * density:.1f} % of the weights (0: no longer finite)"
        return [Table(title, header, rows)]

    @classmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        found = []
        for name in (name for name in SMOOTH if name in data):
            d = _against(data, name, "relu", 0)
            found.append(above(f"{name} is more accurate than ReLU, dense", d, f"{d.text(1)} points"))
        if "sigmoid" in data:
            d = _against(data, "relu", "sigmoid", 0)
            found.append(above("sigmoid is more than 5 points behind ReLU", d, f"{d.text(1)} points", 5))
        last = max(row["cycle"] for row in data["relu"])
        # Seeds are what varies: the activations of one seed share its batches.
        arms = [[values(data[name], "accuracy", arm=arm, cycle=last) for name in data] for arm in ("AP", "none")]
        by_seed = [[sum(column) / len(column) for column in zip(*rows, strict=True)] for rows in arms]
        ap = intervals.paired(*by_seed)
        found.append(above("AP raises the pruned networks' accuracy, over all activations", ap, f"{ap.text(2)} points"))
        return found

    @classmethod
    def plot(cls, data: Data, figure: Figure) -> None:
        axes = figure.subplots()
        names = sorted(data, key=lambda n: -_accuracy(data, n, "none", 0).mean)
        last = max(row["cycle"] for row in data["relu"])
        shown = (("none", 0, "dense"), ("none", last, "pruned"), ("AP", last, "pruned with AP"))
        for offset, (arm, cycle, label) in enumerate(shown):
            points = [_accuracy(data, name, arm, cycle) for name in names]
            places = [i + 0.2 * (offset - 1) for i in range(len(names))]
            axes.errorbar(
                places,
                [p.mean for p in points],
                yerr=[[p.mean - p.low for p in points], [p.high - p.mean for p in points]],
                fmt="o",
                markersize=3,
                linewidth=0.8,
                label=label,
            )
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
        axes.set(ylabel="test accuracy, %", ylim=(0, 101))
        axes.legend()


def _accuracy(data: Data, name: str, arm: str, cycle: int) -> intervals.Interval:
    return intervals.mean(values(data[name], "accuracy", arm=arm, cycle=cycle))


def _against(data: Data, name: str, other: str, cycle: int) -> intervals.Interval:
    return intervals.paired(*(values(data[n], "accuracy", arm="none", cycle=cycle) for n in (name, other)))
