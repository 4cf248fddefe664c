"""How much the predictions of networks trained alike differ, by activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ap import activations
from recipes.studies import images, intervals
from recipes.studies.base import NOT_SHOWN, OPPOSITE, REPRODUCED, Data, Journal, Study, Table, Verdict, register
from recipes.studies.lockstep import Arm, Plan, prune

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS: dict[str, tuple[str, dict[str, float]]] = {
    "relu": ("relu", {}),
    "smelu 0.5": ("smelu", {"beta": 0.5}),
    "smelu 1": ("smelu", {"beta": 1.0}),
    "smelu 2": ("smelu", {"beta": 2.0}),
    "gelu": ("gelu", {}),
    "swish": ("silu", {}),
}


def differences(p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of M models' probabilities p [M, N, K], for each of N samples:

    the prediction difference (1/M) Σₘ ½‖pₘ − p̄‖₁ (for two classes, the mean of |pₘ − p̄| of either), the relative one
    (1/M) Σₘ |pₘ − p̄| / p̄ of the true class, and the share of pairs of models whose labels disagree.

    >>> p = torch.tensor([[[0.2, 0.8]], [[0.4, 0.6]]])
    >>> [round(d.item(), 4) for d in differences(p, torch.tensor([0]))]
    [0.1, 0.3333, 0.0]
    """
    mean = p.mean(0)
    absolute = (p - mean).abs().sum(-1).mean(0) / 2
    true = p.gather(-1, labels.expand(len(p), -1).unsqueeze(-1)).squeeze(-1)
    relative = ((true - true.mean(0)).abs() / true.mean(0).clamp(min=1e-9)).mean(0)
    votes = nn.functional.one_hot(p.argmax(-1), p.shape[-1]).sum(0)  # [N, K]
    models = len(p)
    agreeing = (votes * (votes - 1)).sum(-1) / (models * (models - 1))
    return absolute, relative, 1 - agreeing.double()


def noise(n: int, seed: int) -> images.Images:
    """A binary task that noise dominates: 20 normal inputs, labels drawn with probability σ(w·x / 2)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 1000, 1, 1, 20, generator=generator)
    w = torch.randn(20, generator=generator) / 20**0.5
    y = (torch.rand(n + 1000, generator=generator) < torch.sigmoid(x[:, 0, 0] @ w)).long()
    return images.Images((x[:n], y[:n]), (x[n:], y[n:]), (x[n:], y[n:]), 2, 1, 1)


@register("reproducibility")
@dataclass(frozen=True, kw_only=True)
class Reproducibility(Study):
    """Prediction difference of networks trained alike, ReLU against smooth activations."""

    title: ClassVar[str] = "Smooth activations and reproducibility"
    claim: ClassVar[str] = (
        "Networks that differ only in their initial weights and the order of their data disagree in their "
        "predictions; they do so less with SmeLU, the less the wider its smooth part (Shamir, Lin & Coviello "
        "2020)."
    )
    setting: ClassVar[str] = (
        "Groups of dense networks with two hidden layers, trained alike but for the seed. PD is the mean over test"
        " samples and models of |p − p̄| (½ of the absolute differences summed over classes), relative PD that of "
        "the true class divided by p̄, disagreement the share of pairs of models with different labels. Intervals "
        "are bootstraps over groups and samples together; differences to ReLU use the same seeds and samples. "
        "Dense, and pruned by magnitude once with rewinding. The noise-dominated task has two classes."
    )

    tasks: tuple[str, ...] = ("noise", "digits", "fashion-mnist")
    """Tasks: noise, or data sets."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Activations."""
    models: int = 8
    """Networks in a group."""
    groups: int = 4
    """Groups."""
    hidden: int = 64
    """Units a hidden layer."""
    train: int = 4000
    """Training samples."""
    steps: int = 400
    """Steps of each training."""
    pruned: float = 0.8
    """The share of weights that is pruned."""

    @classmethod
    def quick(cls, **options: object) -> Reproducibility:
        small = {"tasks": ("noise", "digits"), "kinds": ("relu", "smelu 1", "smelu 2"), "models": 4, "groups": 3}
        return cls(**{**small, "hidden": 32, "train": 1200, "steps": 120, **options})  # type: ignore[arg-type]

    def measure(self, journal: Journal) -> Data:
        unknown = set(self.kinds) - set(KINDS)
        if unknown or "relu" not in self.kinds:
            raise ValueError(f"kinds must be relu and others of {', '.join(KINDS)}, not {', '.join(self.kinds)}")
        cells = {}
        for task in self.tasks:
            for kind in self.kinds:
                cells[f"{task}/{kind}"] = journal.cell(f"{task}/{kind}", self._cell, task, kind)
        return {"tasks": list(self.tasks), "kinds": list(self.kinds), "cells": cells}

    def _cell(self, task: str, kind: str) -> Data:
        data = noise(self.train, self.seed) if task == "noise" else images.load(task, self.train, 500)
        seeds = [self.seed + i for i in range(self.models * self.groups)]
        name, params = KINDS[kind]
        inputs = data.train[0][0].numel()

        def build(seed: int) -> nn.Module:
            torch.manual_seed(seed)
            act: Callable[[], nn.Module] = lambda: activations.create(name, **params)  # noqa: E731
            hidden = self.hidden
            first, second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
            return nn.Sequential(nn.Flatten(), first, act(), second, act(), nn.Linear(hidden, data.num_classes))

        @torch.no_grad()
        def look(model: nn.Module, data: images.Images) -> dict[str, Any]:
            return {"p": model.eval()(data.test[0]).softmax(-1)}

        rows = prune(build, [Arm("none")], seeds, data, Plan(self.steps, cycles=1, amount=self.pruned), look)
        return {
            state: self._group([row for row in rows if row["cycle"] == cycle], data.test[1])
            for cycle, state in enumerate(("dense", "pruned"))
        }

    def _group(self, rows: list[Data], labels: Tensor) -> Data:
        rows = sorted(rows, key=lambda row: row["seed"])
        result: Data = {"accuracy": [row["accuracy"] for row in rows], "pd": [], "relative": [], "disagreement": []}
        for start in range(0, len(rows), self.models):
            found = differences(torch.stack([row["p"] for row in rows[start : start + self.models]]), labels)
            for key, value in zip(("pd", "relative", "disagreement"), found, strict=True):
                result[key].append([round(v, 6) for v in value.tolist()])
        return result

    @classmethod
    def tables(cls, data: Data) -> list[Table]:
        tables = []
        for state in ("dense", "pruned"):
            rows = []
            for key, cell in data["cells"].items():
                task, kind = key.split("/")
                base = data["cells"][f"{task}/relu"][state]
                row = cell[state]
                versus = "–" if kind == "relu" else _interval(row["pd"], base["pd"]).text(4)
                numbers = [_interval(row[k]).text(4) for k in ("pd", "relative", "disagreement")]
                rows.append([task, kind, intervals.mean(row["accuracy"]).text(1), *numbers, versus])
            columns = ["task", "activation", "accuracy, %", "PD", "relative PD", "disagreement", "PD against ReLU"]
            tables.append(Table(f"Networks trained alike, {state}", columns, rows))
        return tables

    @classmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        found = []
        for task in data["tasks"]:
            for kind in (k for k in data["kinds"] if k.startswith("smelu")):
                for state in ("dense", "pruned"):
                    row, base = (data["cells"][f"{task}/{k}"][state]["pd"] for k in (kind, "relu"))
                    d = _interval(row, base)
                    outcome = REPRODUCED if d.high < 0 else OPPOSITE if d.low > 0 else NOT_SHOWN
                    relative = 100 * d.mean / _interval(base).mean
                    claim = f"{task}, {state}: {kind} has a lower PD than ReLU"
                    found.append(Verdict(claim, outcome, f"{d.text(4)}, {relative:+.0f} %"))
        return found

    @classmethod
    def plot(cls, data: Data, figure: Figure) -> None:
        for axes, task in zip(figure.subplots(1, len(data["tasks"]), squeeze=False)[0], data["tasks"], strict=True):
            for state, marker in (("dense", "o"), ("pruned", "s")):
                for i, kind in enumerate(data["kinds"]):
                    row = data["cells"][f"{task}/{kind}"][state]
                    pd, right = _interval(row["pd"]), intervals.mean(row["accuracy"]).mean
                    label = f"{kind}, {state}"
                    error = [[pd.mean - pd.low], [pd.high - pd.mean]]
                    axes.errorbar([right], [pd.mean], yerr=error, fmt=marker, color=f"C{i}", label=label)
            axes.set(title=task, xlabel="accuracy, %")
        figure.axes[0].set_ylabel("prediction difference")
        figure.axes[0].legend(fontsize="xx-small")


def _interval(values: Sequence[Sequence[float]], others: Sequence[Sequence[float]] | None = None) -> intervals.Interval:
    """The mean over groups and samples [G, N], or of the difference to `others`, with its bootstrap interval."""
    x = np.asarray(values) - (0.0 if others is None else np.asarray(others))
    low, high = intervals.bootstrap(x.shape, lambda g, n: float(x[np.ix_(g, n)].mean()), draws=400)
    return intervals.Interval(float(x.mean()), low, high, x.shape[0])
