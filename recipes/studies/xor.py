"""XOR with a single PReLU neuron."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from recipes.studies import intervals
from recipes.studies.base import Data, Journal, Study, Table, Verdict, check, register
from recipes.studies.intervals import Interval
from recipes.studies.stacked import Adam

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CORNERS = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
TARGETS = torch.tensor([0.0, 1.0, 1.0, 0.0])


def _prelu(z: Tensor, slope: Tensor) -> Tensor:
    return torch.where(z > 0, z, slope * z)


def _neuron(p: Tensor, x: Tensor) -> Tensor:
    return x @ p[:, :2, None]  # [T, 4, 1]


def _mlp(p: Tensor, x: Tensor) -> Tensor:
    hidden = torch.tanh(x @ p[:, :4].view(-1, 2, 2) + p[:, None, 4:6])  # [T, 4, 2]
    return (hidden * p[:, None, 6:8]).sum(-1) + p[:, 8:9]


# Name: number of parameters, where the PReLU slope is (it starts at 0.25), and outputs [T, 4] of corners [4, 2].
MODELS: dict[str, tuple[int, int | None, Callable[[Tensor, Tensor], Tensor]]] = {
    "PReLU": (3, 2, lambda p, x: _prelu(_neuron(p, x)[..., 0], p[:, 2:3])),
    "PReLU with bias": (4, 2, lambda p, x: _prelu(_neuron(p, x)[..., 0] + p[:, 3:4], p[:, 2:3])),
    "ReLU": (2, None, lambda p, x: _neuron(p, x)[..., 0].relu()),
    "GCU": (3, None, lambda p, x: (z := _neuron(p, x)[..., 0] + p[:, 2:3]) * z.cos()),
    "MLP 2-2-1, tanh": (9, None, _mlp),
}


def success(
    model: str, rates: tuple[float, ...], trials: int, epochs: int, seed: int, zero_one: bool = False
) -> Tensor:
    """Which of `trials` trainings at each learning rate got all four corners right, bool [len(rates), trials].

    All of them are one stacked training: Adam on the mean squared error, full batch, parameters from U(−1, 1).
    `zero_one` takes inputs of 0 and 1 instead of ±1.
    """
    size, slope, forward = MODELS[model]
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(trials, size, generator=generator) * 2 - 1
    if slope is not None:
        start[:, slope] = 0.25
    p = start.repeat(len(rates), 1).requires_grad_()  # the same starts at every rate
    optimizer = Adam({"p": p}, torch.tensor(rates).repeat_interleave(trials))
    x = (CORNERS + 1) / 2 if zero_one else CORNERS
    for _ in range(epochs):
        optimizer.step((forward(p, x) - TARGETS).square().mean(1).sum())
    right = ((forward(p, x).detach() > 0.5) == (TARGETS > 0.5)).all(1)
    return right.view(len(rates), trials)


@register("xor")
@dataclass(frozen=True, kw_only=True)
class Xor(Study):
    """XOR with one PReLU neuron."""

    title: ClassVar[str] = "XOR with one PReLU neuron"
    claim: ClassVar[str] = (
        "One neuron with a learnable PReLU and no bias, three parameters in all, solves XOR in every training over"
        " a wide range of learning rates, where other small networks often fail (Pinto & Tavares 2024)."
    )
    setting: ClassVar[str] = (
        "Inputs ±1, mean squared error on targets 0 and 1, Adam on the full batch of four, parameters from U(−1, "
        "1), slope from 0.25. A training succeeds when all four outputs are on the right side of 0.5. All "
        "trainings of a model, at all learning rates, run as one."
    )

    trials: int = 500
    """Trainings for each model and learning rate."""
    epochs: int = 300
    """Steps of Adam."""
    rates: tuple[float, ...] = (0.002, 0.003, 0.01, 0.1, 1.0, 3.0, 10.0)
    """Learning rates."""

    @classmethod
    def quick(cls, **options: object) -> Xor:
        return cls(**{"trials": 100, **options})  # type: ignore[arg-type]

    def measure(self, journal: Journal) -> Data:
        def one(model: str, zero_one: bool = False) -> list[int]:
            return success(model, self.rates, self.trials, self.epochs, self.seed, zero_one).sum(1).tolist()

        models = {model: journal.cell(model, functools.partial(one, model)) for model in MODELS}
        models["PReLU, inputs 0 and 1"] = journal.cell("zero-one", lambda: one("PReLU", zero_one=True))
        return {"rates": list(self.rates), "trials": self.trials, "successes": models}

    @classmethod
    def tables(cls, data: Data) -> list[Table]:
        rows = [
            [model, *(intervals.share(k, data["trials"]).text(0) for k in counts)]
            for model, counts in data["successes"].items()
        ]
        columns = ["model", *(f"rate {rate:g}" for rate in data["rates"])]
        return [Table(f"Trainings that solve XOR, in % of {data['trials']} [95 % interval]", columns, rows)]

    @classmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        usual = [i for i, rate in enumerate(data["rates"]) if 0.01 <= rate <= 1]
        n = data["trials"] * len(usual)

        def over(model: str) -> Interval:
            return intervals.share(sum(data["successes"][model][i] for i in usual), n)

        one, bias, mlp = over("PReLU"), over("PReLU with bias"), over("MLP 2-2-1, tanh")
        span = f"rates {data['rates'][usual[0]]:g} to {data['rates'][usual[-1]]:g}" if usual else "no usual rate"
        text = one.text(1)
        return [
            check("one PReLU neuron solves XOR in more than 95 % of trainings", one.low > 95, f"{text} %, {span}"),
            check("with a bias it succeeds less often", bias.high < one.low, f"{bias.text(1)} against {text} %"),
            check("the 2-2-1 network succeeds less often", mlp.high < one.low, f"{mlp.text(1)} against {text} %"),
        ]

    @classmethod
    def plot(cls, data: Data, figure: Figure) -> None:
        axes = figure.subplots()
        for model, counts in data["successes"].items():
            axes.plot(data["rates"], [100 * k / data["trials"] for k in counts], marker="o", label=model)
        axes.set(xscale="log", xlabel="learning rate", ylabel="trainings that solve XOR, %", ylim=(-3, 103))
        axes.legend(fontsize="small")
