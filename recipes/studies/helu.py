"""HeLU: dying units, inference cost and accuracy against its threshold, dense and pruned, with and without AP."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ap import activations
from recipes.studies import images, intervals
from recipes.studies.base import NOT_SHOWN, OPPOSITE, REPRODUCED, Data, Journal, Study, Table, Verdict, above, register
from recipes.studies.lockstep import Arm, Plan, dead, prune, values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = (Arm("none"), Arm("AP", "least-moved-negative"))


@register("helu")
@dataclass(frozen=True, kw_only=True)
class Helu(Study):
    """HeLU's threshold: dying units, accuracy, inference time, and together with AP."""

    title: ClassVar[str] = "HeLU and dying units"
    claim: ClassVar[str] = (
        "HeLU computes ReLU in the forward pass and passes gradients down to −α, so that units do not die, at "
        "ReLU's inference cost; published with WRN-40-4 on CIFAR-10 are 92.84 (ReLU), 95.80 (HeLU) and 96.11 % "
        "(GELU)."
    )
    setting: ClassVar[str] = (
        "A network with two hidden layers and no normalisation, trained at a learning rate at which ReLU units "
        "die; magnitude pruning with rewinding, with and without AP at equal density. A unit is dead (static) when"
        " it is 0 for all of 500 test images, and gradient-dead when it gets no gradient from any. Time: "
        "evaluation passes of the same network on a CPU, interleaved rounds, medians and the quartiles of the "
        "ratio to ReLU."
    )

    data: str = "fashion-mnist"
    """Data set."""
    train: int = 10000
    """Training images."""
    alphas: tuple[float, ...] = (0.0, 0.01, 0.05, 0.1, 0.5, 1.0)
    """Thresholds α of HeLU."""
    hidden: tuple[int, int] = (100, 50)
    """Widths of the hidden layers."""
    rate: float = 0.1
    """Learning rate."""
    seeds: int = 5
    """Networks an arm."""
    steps: int = 400
    """Steps of each training."""
    cycles: int = 4
    """Prunings."""
    rounds: int = 60
    """Rounds of the timing."""

    @classmethod
    def quick(cls, **options: object) -> Helu:
        small = {"data": "digits", "alphas": (0.05, 1.0), "hidden": (40, 20), "seeds": 3, "steps": 80, "cycles": 2}
        return cls(**{**small, "rounds": 15, **options})  # type: ignore[arg-type]

    def measure(self, journal: Journal) -> Data:
        kinds: dict[str, tuple[str, dict[str, float]]] = {"relu": ("relu", {})}
        kinds |= {f"helu {alpha:g}": ("helu", {"alpha": alpha}) for alpha in self.alphas} | {"gelu": ("gelu", {})}
        rows = {kind: journal.cell(kind, self._cell, *how) for kind, how in kinds.items()}
        return {"rows": rows, "times": journal.cell("times", self._times, self.rounds)}

    def _cell(self, name: str, params: dict[str, float]) -> list[Data]:
        data = images.load(self.data, self.train, 2000)
        seeds = [self.seed + i for i in range(self.seeds)]
        inputs = data.in_channels * data.image_size**2

        def build(seed: int) -> nn.Module:
            torch.manual_seed(seed)
            first, second = self.hidden
            act: Callable[[], nn.Module] = lambda: activations.create(name, **params)  # noqa: E731
            layers = [nn.Linear(inputs, first), act(), nn.Linear(first, second), act()]
            return nn.Sequential(nn.Flatten(), *layers, nn.Linear(second, data.num_classes))

        return prune(build, ARMS, seeds, data, Plan(self.steps, rate=self.rate, cycles=self.cycles), _look)

    @staticmethod
    def _times(rounds: int) -> Data:
        torch.manual_seed(0)
        body = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)]
        networks = {
            name: nn.Sequential(*(m for layer in body for m in (layer, activations.create(name)))).eval()
            for name in ("relu", "helu", "gelu")
        }
        x = torch.randn(16, 16, 32, 32)
        times: dict[str, list[float]] = {name: [] for name in networks}
        with torch.inference_mode():
            for step in range(rounds + 3):
                for name, network in networks.items():
                    start = time.perf_counter()
                    network(x)
                    if step >= 3:  # the first rounds warm up
                        times[name].append(time.perf_counter() - start)
        return times

    @classmethod
    def tables(cls, data: Data) -> list[Table]:
        last = max(row["cycle"] for row in data["rows"]["relu"])
        tables = []
        for cycle, arms in ((0, ("none",)), (last, ("none", "AP"))):
            rows = []
            for kind, found in data["rows"].items():
                for arm in arms:
                    where = {"arm": arm, "cycle": cycle}
                    cells = [
                        _mean(values(found, key, **where), scale=scale, digits=digits)
                        for key, scale, digits in (
                            ("accuracy", 1, 2),
                            ("static", 100, 1),
                            ("gradient_static", 100, 1),
                            ("total", 100, 1),
                        )
                    ]
                    rows.append([kind, arm, *cells])
            density = values(data["rows"]["relu"], "density", arm="none", cycle=cycle)[0]
            title = f"At {100 * density:.1f} % of the weights"
            columns = ["activation", "AP", "accuracy, %", "static, %", "gradient-dead, static, %", "total, %"]
            tables.append(Table(title, columns, rows))
        timing = []
        for name in data["times"]:
            median = 1e3 * float(torch.tensor(data["times"][name]).median())
            low, middle, high = _ratio(data["times"], name)
            timing.append([name, f"{median:.3f}", f"{middle:.3f} [{low:.3f}, {high:.3f}]"])
        columns = ["activation", "ms a pass (median)", "ratio to ReLU (median, quartiles)"]
        return [*tables, Table("Inference", columns, timing)]

    @classmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        relu = data["rows"]["relu"]
        dead_relu = values(relu, "static", arm="none", cycle=0)
        found = []
        for kind, rows in data["rows"].items():
            if not kind.startswith("helu"):
                continue
            fewer = intervals.paired(dead_relu, values(rows, "static", arm="none", cycle=0))
            scaled = intervals.Interval(100 * fewer.mean, 100 * fewer.low, 100 * fewer.high, fewer.n)
            gain = intervals.paired(
                values(rows, "accuracy", arm="none", cycle=0), values(relu, "accuracy", arm="none", cycle=0)
            )
            stuck = [100 * v for v in values(rows, "gradient_static", arm="none", cycle=0)]
            fewer_stuck = intervals.paired([100 * v for v in dead_relu], stuck)
            found.append(above(f"{kind} leaves fewer units dead than ReLU", scaled, f"{scaled.text(1)} points fewer"))
            claim = f"{kind} leaves fewer units without any gradient than ReLU"
            found.append(above(claim, fewer_stuck, f"{fewer_stuck.text(1)} points fewer"))
            found.append(above(f"{kind} is more accurate than ReLU", gain, f"{gain.text()} points"))
        low, middle, high = _ratio(data["times"], "helu")
        # Quartiles far apart: the machine was too busy to tell.
        outcome = REPRODUCED if middle <= 1.1 and high - low < 0.3 else OPPOSITE if low > 1.1 else NOT_SHOWN
        text = f"ratio {middle:.3f}, quartiles {low:.3f} to {high:.3f}"
        found.append(Verdict("HeLU's inference costs what ReLU's does", outcome, text))
        return found

    @classmethod
    def plot(cls, data: Data, figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for axes, key, label in ((left, "static", "units that are dead, %"), (right, "accuracy", "test accuracy, %")):
            scale = 100 if key == "static" else 1
            last = max(row["cycle"] for row in data["rows"]["relu"])
            for cycle, arm, name in ((0, "none", "dense"), (last, "none", "pruned"), (last, "AP", "pruned, AP")):
                shown = {k: values(rows, key, arm=arm, cycle=cycle) for k, rows in data["rows"].items()}
                points = {k: scale * sum(v) / len(v) for k, v in shown.items() if None not in v}
                axes.plot(list(points), list(points.values()), marker="o", label=name)
            axes.set(ylabel=label)
            axes.tick_params("x", rotation=45)
        left.legend()


def _look(model: nn.Module, data: images.Images) -> dict[str, Any]:
    """The rates, and the share of units that get no gradient from any image (the dead ones where there is no other)."""
    rates = dead(model, data)
    layers = rates["layers"].values()
    without = [r["static"] if r["gradient_static"] is None else r["gradient_static"] for r in layers]
    widths = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)][:-1]
    total = sum(w * r for w, r in zip(widths, without, strict=True)) / sum(widths) if without else None
    return {**rates, "gradient_static": total}


def _mean(found: list[float], scale: float, digits: int) -> str:
    if any(value is None for value in found):
        return "cannot die"
    return intervals.mean([scale * value for value in found]).text(digits)


def _ratio(times: Data, name: str) -> tuple[float, float, float]:
    ratio = torch.tensor(times[name], dtype=torch.float64) / torch.tensor(times["relu"], dtype=torch.float64)
    low, middle, high = torch.quantile(ratio, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return low, middle, high
