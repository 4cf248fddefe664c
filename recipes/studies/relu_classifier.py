"""ReLU instead of softmax as the last layer of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes import models
from recipes.studies import images, intervals
from recipes.studies.base import NOT_SHOWN, OPPOSITE, REPRODUCED, Data, Journal, Study, Table, Verdict, register
from recipes.studies.stacked import Adam, Stack, accuracy, fit, outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TINY = 1e-7


def softmax(o: Tensor, y: Tensor) -> Tensor:
    """The baseline: −log softmax(o)_y."""
    return F.cross_entropy(o.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)


def normalised(o: Tensor, y: Tensor) -> Tensor:
    """−log of the share relu(o)_y / Σ relu(o), clipped to [1e-7, 1 − 1e-7]."""
    p = o.relu()
    share = _of(p, y) / p.sum(-1).clamp(min=TINY)
    return -share.clamp(TINY, 1 - TINY).log()


def literal(o: Tensor, y: Tensor) -> Tensor:
    """The paper's formula as printed, −log relu(o)_y, clipped as above: nothing pushes the other classes down."""
    return -_of(o, y).relu().clamp(TINY, 1 - TINY).log()


def softmax_of_relu(o: Tensor, y: Tensor) -> Tensor:
    """−log softmax(relu(o))_y."""
    return softmax(o.relu(), y)


def _of(scores: Tensor, y: Tensor) -> Tensor:
    return scores.gather(-1, y.unsqueeze(-1)).squeeze(-1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": softmax,
    "relu, normalised": normalised,
    "relu, literal": literal,
    "relu, softmax cross entropy": softmax_of_relu,
}


def per_trial(seeds: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss [T] of a stack that holds `seeds` networks for each of `LOSSES`, in their order."""

    def loss(o: Tensor, y: Tensor) -> Tensor:
        parts = zip(LOSSES.values(), o.split(seeds), y.split(seeds), strict=True)
        return torch.cat([one(scores, labels).mean(1) for one, scores, labels in parts])

    return loss


@register("relu-classifier")
@dataclass(frozen=True, kw_only=True)
class ReluClassifier(Study):
    """ReLU as the classifier, with three losses, against softmax."""

    title: ClassVar[str] = "ReLU as the classifier"
    claim: ClassVar[str] = (
        "A network that classifies by argmax of max(0, θh + b) is comparable to one with a softmax (Agarap 2018: "
        "on Fashion-MNIST 89.06 against 89.35 % for a feed-forward network and 85.84 against 86.08 % for a CNN)."
    )
    setting: ClassVar[str] = (
        "The paper leaves the loss open, so three are tried: the true class as a share of Σ relu(o) (normalised), "
        "the formula as printed (literal), and the softmax cross entropy of relu(o). All losses and seeds train as"
        " one stack, with the same initial weights, batches (of 64) and Adam at 0.001; the accuracy is the test "
        "set's after the last step. A true-class score is dead when relu(o)_y = 0: such a sample teaches the ReLU "
        "losses nothing."
    )

    data: str = "fashion-mnist"
    """Data set."""
    train: int = 20000
    """Training images."""
    seeds: int = 5
    """Networks for each loss."""
    steps: int = 1500
    """Steps of Adam."""
    networks: tuple[str, ...] = ("lenet-300-100", "cnn")
    """Models."""
    margin: float = 1.0
    """Percentage points within which accuracies count as comparable."""

    @classmethod
    def quick(cls, **options: object) -> ReluClassifier:
        return cls(**{"data": "digits", "seeds": 3, "steps": 200, "networks": ("cnn",), "margin": 3.0, **options})  # type: ignore[arg-type]

    def measure(self, journal: Journal) -> Data:
        networks = {network: journal.cell(network, self._train, network) for network in self.networks}
        return {"margin": self.margin, "networks": networks}

    def _train(self, network: str) -> Data:
        data = images.load(self.data, self.train)
        seeds = [self.seed + i for i in range(self.seeds)]
        members = []
        for seed in seeds:
            torch.manual_seed(seed)
            members.append(models.create(network, data.num_classes, data.in_channels, data.image_size))
        stack = Stack(members * len(LOSSES))
        loss = per_trial(len(seeds))
        optimizer = Adam(stack.params, 1e-3)
        fit(stack, optimizer, *data.train, seeds * len(LOSSES), steps=self.steps, batch=64, loss=loss)
        scores = accuracy(stack, *data.test)
        true = _of(outputs(stack, data.test[0]), data.test[1].expand(len(stack), -1))
        dead = (100 * (true <= 0).double().mean(1)).tolist()
        n = len(seeds)
        return {
            name: {"accuracy": scores[i * n : (i + 1) * n], "dead": dead[i * n : (i + 1) * n]}
            for i, name in enumerate(LOSSES)
        }

    @classmethod
    def tables(cls, data: Data) -> list[Table]:
        rows: list[Sequence[Any]] = []
        for network, losses in data["networks"].items():
            for name, row in losses.items():
                difference = intervals.paired(row["accuracy"], losses["softmax"]["accuracy"])
                versus = "–" if name == "softmax" else difference.text()
                dead = "–" if name == "softmax" else intervals.mean(row["dead"]).text()
                rows.append([network, name, intervals.mean(row["accuracy"]).text(), versus, dead])
        columns = ["network", "loss", "accuracy, %", "against softmax, points", "dead true-class scores, %"]
        return [Table("Test accuracy, mean over seeds [95 % interval]; differences are paired by seed", columns, rows)]

    @classmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        found, margin = [], data["margin"]
        for network, losses in data["networks"].items():
            for name, row in losses.items():
                if name == "softmax":
                    continue
                d = intervals.paired(row["accuracy"], losses["softmax"]["accuracy"])
                comparable = d.low > -margin and d.high < margin
                worse = d.high < -margin
                outcome = REPRODUCED if comparable else OPPOSITE if worse else NOT_SHOWN
                found.append(
                    Verdict(f"{network}: {name} is within ±{margin:g} points of softmax", outcome, f"{d.text()} points")
                )
        return found

    @classmethod
    def plot(cls, data: Data, figure: Figure) -> None:
        for axes, (network, losses) in zip(
            figure.subplots(1, len(data["networks"]), squeeze=False)[0], data["networks"].items(), strict=True
        ):
            for i, row in enumerate(losses.values()):
                axes.plot([i] * len(row["accuracy"]), row["accuracy"], "o", alpha=0.6)
                axes.annotate(f"{intervals.mean(row['accuracy']).mean:.1f}", (i + 0.1, max(row["accuracy"])))
            axes.set_xticks(range(len(losses)), [name.replace(", ", ",\n") for name in losses], fontsize="x-small")
            axes.set(title=network, ylabel="test accuracy, %")
