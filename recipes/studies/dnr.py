"""Dead neurons against density and training step; what AP's step and its controls change; BatchNorm's part in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from recipes.studies import images, intervals
from recipes.studies.base import Data, Journal, Study, Table, Verdict, above, register
from recipes.studies.lockstep import Arm, Plan, dead, prune, values
from recipes.studies.stacked import SGD, Stack, fit, warmup_cosine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTROLS = ("random", "random-negative", "smallest-negative", "least-moved-positive", "most-moved-negative")
ARMS = (Arm("none"), Arm("AP", "least-moved-negative"), *(Arm(name, name) for name in CONTROLS))


def mlp(data: images.Images, hidden: tuple[int, int], norm: bool) -> Callable[[int], nn.Module]:
    """Two hidden layers on the flattened image, with or without BatchNorm before each ReLU."""

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        width = data.in_channels * data.image_size**2
        for out in hidden:
            layers += [nn.Linear(width, out), *[nn.BatchNorm1d(out)] * norm, nn.ReLU()]
            width = out
        return nn.Sequential(*layers, nn.Linear(width, data.num_classes))

    return build


@register("dnr")
@dataclass(frozen=True, kw_only=True)
class Dnr(Study):
    """Dead-neuron rates against density and step, AP's effect on them, and BatchNorm's."""

    title: ClassVar[str] = "Dead neurons, pruning and AP"
    claim: ClassVar[str] = (
        "The dynamic dead-neuron rate falls as more weights are pruned; removing the negative weights that moved "
        "least lowers it further at equal density (Liu, Ghosh & Motani 2023)."
    )
    setting: ClassVar[str] = (
        "A network with two hidden layers, with and without BatchNorm; magnitude pruning with rewinding to the "
        "initial weights; every arm removes the same number of weights at each cycle, and AP and its controls "
        "choose the same share of them. Dead neurons are counted in evaluation mode on the same 500 test images. "
        "Arms and seeds of a network train as one stack with the same initial weights and batches."
    )

    data: str = "fashion-mnist"
    """Data set."""
    train: int = 10000
    """Training images."""
    hidden: tuple[int, int] = (100, 50)
    """Widths of the hidden layers."""
    seeds: int = 4
    """Networks an arm."""
    steps: int = 400
    """Steps of each training."""
    cycles: int = 7
    """Prunings."""

    @classmethod
    def quick(cls, **options: object) -> Dnr:
        return cls(**{"data": "digits", "hidden": (40, 20), "seeds": 2, "steps": 100, "cycles": 3, **options})  # type: ignore[arg-type]

    def measure(self, journal: Journal) -> Data:
        data = images.load(self.data, self.train, 2000)
        seeds = [self.seed + i for i in range(self.seeds)]
        plan = Plan(self.steps, cycles=self.cycles)
        result: Data = {"networks": {}, "steps": {}}
        for name, norm in (("without BatchNorm", False), ("with BatchNorm", True)):
            build = mlp(data, self.hidden, norm)
            arms = ARMS if not norm else ARMS[:2]
            result["networks"][name] = journal.cell(name, prune, build, arms, seeds, data, plan)
            result["steps"][name] = journal.cell(f"{name}, steps", _over_steps, build, seeds, data, plan)
        return result

    @classmethod
    def tables(cls, data: Data) -> list[Table]:
        tables = []
        for network, rows in data["networks"].items():
            last = max(row["cycle"] for row in rows)
            by_density = [
                [
                    f"{100 * values(rows, 'density', arm='none', cycle=c)[0]:.1f} %",
                    *(
                        intervals.mean(values(rows, key, arm=arm, cycle=c)).text(3 if key != "accuracy" else 2)
                        for arm in ("none", "AP")
                        for key in ("total", "static", "accuracy")
                    ),
                ]
                for c in range(last + 1)
            ]
            columns = [f"{k}, {a}" for a in ("none", "AP") for k in ("total", "static", "accuracy, %")]
            tables.append(Table(f"Dead-neuron rates by density, {network}", ["density", *columns], by_density))
            paired = [
                [arm, *(_against(rows, key, arm, last).text(digits) for key, digits in (("total", 3), ("accuracy", 2)))]
                for arm in dict.fromkeys(row["arm"] for row in rows)
                if arm != "none"
            ]
            title = f"Against no AP at the last density, paired by seed, {network}"
            tables.append(Table(title, ["criterion", "total rate", "accuracy, points"], paired))
            layers = [
                [layer, *(f"{_layer(rows, layer, arm, c):.3f}" for c in (0, last) for arm in ("none", "AP"))]
                for layer in rows[0]["layers"]
            ]
            columns = ["layer", "dense, none", "dense, AP", "last, none", "last, AP"]
            tables.append(Table(f"Total rate of each layer, {network}", columns, layers))
        steps = [
            [network, row["step"], *(intervals.mean(row[key]).text(3) for key in ("total", "static"))]
            for network, rows in data["steps"].items()
            for row in rows
        ]
        tables.append(Table("Dead-neuron rates by training step, dense", ["network", "step", "total", "static"], steps))
        return tables

    @classmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        found = []
        for network, rows in data["networks"].items():
            last = max(row["cycle"] for row in rows)
            fall = intervals.paired(
                values(rows, "dynamic", arm="none", cycle=0), values(rows, "dynamic", arm="none", cycle=last)
            )
            lower = _against(rows, "total", "AP", last)
            gain = _against(rows, "accuracy", "AP", last)
            less = intervals.Interval(-lower.mean, -lower.high, -lower.low, lower.n)
            found += [
                above(f"{network}: pruning lowers the dynamic rate", fall, f"by {fall.text(3)}"),
                above(f"{network}: AP lowers the total rate at equal density", less, f"by {less.text(3)}"),
                above(f"{network}: AP raises accuracy at the last density", gain, f"{gain.text()} points"),
            ]
        return found

    @classmethod
    def plot(cls, data: Data, figure: Figure) -> None:
        for axes, (network, rows) in zip(figure.subplots(1, 2, sharey=True), data["networks"].items(), strict=True):
            last = max(row["cycle"] for row in rows)
            for arm in dict.fromkeys(row["arm"] for row in rows):
                densities = [values(rows, "density", arm=arm, cycle=c)[0] for c in range(last + 1)]
                for key, style in (("total", "-"), ("static", ":")):
                    rates = [intervals.mean(values(rows, key, arm=arm, cycle=c)).mean for c in range(last + 1)]
                    label = arm if key == "total" else None
                    color = f"C{list(dict.fromkeys(row['arm'] for row in rows)).index(arm)}"
                    axes.plot(densities, rates, style, color=color, label=label)
            axes.set(title=network, xlabel="density", xscale="log")
            axes.invert_xaxis()
            axes.legend(fontsize="x-small")
        figure.axes[0].set_ylabel("dead-neuron rate (total —, static ···)")


def _over_steps(build: Callable[[int], nn.Module], seeds: list[int], data: images.Images, plan: Plan) -> list[Data]:
    """Rates of the dense networks at seven points of the training: one training, looked at on its way."""
    rows: list[Data] = []
    whole = [build(seed) for seed in seeds]
    marks = sorted({round(plan.steps * share) for share in (0, 0.02, 0.05, 0.1, 0.25, 0.5, 1)})
    stack = Stack(whole)

    def look(step: int) -> None:
        if step in marks:
            rates = [dead(model, data) for model in stack.write_back()]
            rows.append({"step": step, **{key: [r[key] for r in rates] for key in ("total", "static", "dynamic")}})
            stack.train()

    optimizer = SGD(stack.params, plan.rate, plan.momentum, plan.weight_decay)
    fit(
        stack, optimizer, *data.train, seeds, steps=plan.steps, batch=plan.batch, schedule=warmup_cosine(), on_step=look
    )
    return rows


def _against(rows: list[Data], key: str, arm: str, cycle: int) -> intervals.Interval:
    return intervals.paired(values(rows, key, arm=arm, cycle=cycle), values(rows, key, arm="none", cycle=cycle))


def _layer(rows: list[Data], layer: str, arm: str, cycle: int) -> float:
    chosen: list[Any] = values(rows, "layers", arm=arm, cycle=cycle)
    return sum(layers[layer]["total"] for layers in chosen) / len(chosen)
