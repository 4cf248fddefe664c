"""Initialisation: the signal's variance through depth, and whether a deep rectifier network trains at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from ap import activations
from recipes.studies import images, intervals
from recipes.studies.base import Data, Journal, Study, Table, Verdict, above, check, register
from recipes.studies.quadrature import exponent, gain
from recipes.studies.stacked import SGD, Stack, accuracy, fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RULES = ("gain² / fan", "1 / fan", "PyTorch's default")


def variances(name: str, depth: int, width: int, draws: int, factor: float, seed: int) -> list[float]:
    """Mean square of the pre-activations of layers 1 … depth + 1, for weights of variance factor² / fan.

    The mean is over `draws` networks, which run as one, 16 inputs and all units.
    """
    generator = torch.Generator().manual_seed(seed)
    activation = activations.create(name)
    h = torch.randn(draws, 16, width, generator=generator)
    found = []
    with torch.no_grad():
        for _ in range(depth + 1):
            found.append(float(h.double().square().mean()))
            w = torch.randn(draws, width, width, generator=generator) * (factor / math.sqrt(width))
            h = torch.bmm(activation(h), w)
    return found


def deep_network(depth: int, width: int, inputs: int, classes: int, rule: str, seed: int) -> nn.Sequential:
    """`depth` ReLU layers and a classifier, biases zero, weights drawn by one of `RULES` (the same normal draws)."""
    generator = torch.Generator().manual_seed(seed)
    factor = {"gain² / fan": math.sqrt(2), "1 / fan": 1.0, "PyTorch's default": math.sqrt(1 / 3)}[rule]
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(depth + 1):
        fan, out = (inputs if i == 0 else width), (classes if i == depth else width)
        layer = nn.Linear(fan, out)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(out, fan, generator=generator) * factor / math.sqrt(fan))
            layer.bias.zero_()
        layers += [layer] if i == depth else [layer, nn.ReLU()]
    return nn.Sequential(*layers)


@register("init")
@dataclass(frozen=True, kw_only=True)
class Init(Study):
    """Signal variance through depth, and the training of a deep rectifier network, by initialisation."""

    title: ClassVar[str] = "Initialisation for any activation"
    claim: ClassVar[str] = (
        "Weights of variance gain² / fan keep the signal's variance through any depth, where 1 / fan halves it at "
        "each ReLU; a 30-layer rectifier network trains with the former and stalls with the latter (He et al. "
        "2015)."
    )
    setting: ClassVar[str] = (
        "Random fully connected networks without biases on normal inputs: the mean square of the pre-activations, "
        "over several draws. The gain is 1/√E[f(z)²] by quadrature; the exponent d log q′ / d log q says if a "
        "deviation from variance 1 shrinks (below 1) or grows (above) from layer to layer. Then a ReLU network is "
        "trained with momentum, clipped gradients and a rate that falls to zero; all rules and seeds as one stack,"
        " with the same draws and batches."
    )

    names: tuple[str, ...] = (
        "relu", "prelu", "helu", "smelu", "elu", "selu", "tanh", "gelu", "silu", "mish", "hardswish", "gcu",
    )  # fmt: skip
    """Activations."""
    depth: int = 30
    """Layers."""
    width: int = 1024
    """Units a layer, for the variances."""
    draws: int = 4
    """Networks drawn for each activation."""
    data: str = "digits"
    """Data set of the training."""
    steps: int = 400
    """Steps of the training."""
    seeds: int = 5
    """Networks for each rule."""

    @classmethod
    def quick(cls, **options: object) -> Init:
        names = ("relu", "prelu", "tanh", "gelu", "silu")
        return cls(**{"names": names, "width": 256, "draws": 8, "steps": 250, "seeds": 5, **options})  # type: ignore[arg-type]

    def measure(self, journal: Journal) -> Data:
        rows = {name: journal.cell(name, self._signal, name) for name in self.names}
        return {"depth": self.depth, "signal": rows, "training": journal.cell("training", self._train)}

    def _signal(self, name: str) -> Data:
        factor = gain(activations.create(name))
        args = (name, self.depth, self.width, self.draws)
        return {
            "gain": factor,
            "exponent": exponent(activations.create(name)),
            "right": variances(*args, factor, self.seed),
            "one": variances(*args, 1.0, self.seed),
        }

    def _train(self) -> Data:
        data = images.load(self.data)
        inputs = data.in_channels * data.image_size**2
        seeds = [self.seed + i for i in range(self.seeds)]
        stack = Stack([deep_network(self.depth, 64, inputs, data.num_classes, r, s) for r in RULES for s in seeds])
        optimizer = SGD(stack.params, 0.1, 0.9, clip=0.5)
        every = seeds * len(RULES)
        last = fit(stack, optimizer, *data.train, every, steps=self.steps, batch=64, schedule=_falling).tolist()
        right = accuracy(stack, *data.test)
        n = len(seeds)
        return {
            rule: {"loss": last[i * n : (i + 1) * n], "accuracy": right[i * n : (i + 1) * n]}
            for i, rule in enumerate(RULES)
        }

    @classmethod
    def tables(cls, data: Data) -> list[Table]:
        rows = []
        for name, row in data["signal"].items():
            ratios = [values[-1] / values[0] for values in (row["right"], row["one"])]
            stable = "stable" if row["exponent"] <= 1.005 else "unstable: normalise"
            rows.append([name, f"{row['gain']:.5f}", f"{row['exponent']:.3f}", stable, *(f"{r:.3g}" for r in ratios)])
        columns = ["activation", "gain", "exponent", "fixed point", "with gain² / fan", "with 1 / fan"]
        training = [
            [rule, intervals.mean(row["accuracy"]).text(1), intervals.mean(row["loss"]).text(3)]
            for rule, row in data["training"].items()
        ]
        return [
            Table(f"Variance after {data['depth']} layers, as a multiple of the first layer's", columns, rows),
            Table(
                f"A ReLU network of {data['depth']} layers after training",
                ["variance of the weights", "test accuracy, %", "last training loss"],
                training,
            ),
        ]

    @classmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        depth, signal, training = data["depth"], data["signal"], data["training"]
        found = []
        if "relu" in signal:
            halvings = -math.log2(signal["relu"]["one"][-1] / signal["relu"]["one"][0])
            found.append(
                check(
                    "with 1 / fan, ReLU halves the variance at every layer",
                    abs(halvings - depth) < 0.1 * depth,
                    f"{halvings:.1f} halvings in {depth} layers",
                )
            )
        stable = {name: row["right"][-1] / row["right"][0] for name, row in signal.items() if row["exponent"] <= 1.005}
        inside = [name for name, ratio in stable.items() if 0.5 < ratio < 2]
        rest = ", ".join(f"{name} {ratio:.2g}" for name, ratio in stable.items() if name not in inside)
        found.append(
            check(
                "with the right gain it stays within a factor of 2 where the fixed point is stable",
                len(inside) == len(stable),
                f"{len(inside)} of {len(stable)} activations" + (f"; outside: {rest}" if rest else ""),
            )
        )
        better = intervals.paired(training["gain² / fan"]["accuracy"], training["1 / fan"]["accuracy"])
        found.append(
            above("the deep network trains with gain² / fan, 1 / fan stalls", better, f"{better.text(1)} points", 20)
        )
        return found

    @classmethod
    def plot(cls, data: Data, figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, key, title in ((left, "right", "variance gain² / fan"), (right, "one", "variance 1 / fan")):
            for i, (name, row) in enumerate(data["signal"].items()):
                style = "-" if i < 10 else "--"  # the colours repeat after ten
                axes.plot(range(1, len(row[key]) + 1), row[key], style, label=name)
            axes.set(title=title, xlabel="layer", yscale="log")
        left.set_ylabel("variance of the pre-activations")
        left.legend(fontsize="x-small", ncols=2)


def _falling(done: float) -> float:
    return 1 - done
