"""The decisive experiment: the dead-neuron rate set by itself, without AP's removals, and AP's removals without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from recipes.config import Experiment
from recipes.studies import intervals, tickets
from recipes.studies.base import Data, Journal, Study, Table, Verdict, above, register
from recipes.studies.tickets import Bench, against, by_seed, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATE_ONLY = "none, at AP's rate"
REMOVALS_ONLY = "AP, at the rate of none"


def _measure(config: Experiment, data: Any, seed: int, doses: tuple[float, ...]) -> list[Data]:
    bench = Bench(config, data, seed)
    rows_none, tickets_none, records_none = bench.trajectory("none")
    rows_ap, tickets_ap, records_ap = bench.trajectory("lite")
    rows: list[Data] = []
    for cycle in range(1, min(len(rows_none), len(rows_ap))):
        arms = {
            "none": rows_none[cycle],
            "AP": rows_ap[cycle],
            RATE_ONLY: bench.again(tickets_none[cycle], records_ap[cycle], cycle),
            REMOVALS_ONLY: bench.again(tickets_ap[cycle], records_none[cycle], cycle),
        }
        for dose in doses:
            arms[f"none, rate {dose:+g}"] = bench.again(tickets_none[cycle], records_none[cycle], cycle, dose)
        rows += rows_of(arms, seed, cycle)
    return rows


@register("decisive")
@dataclass(frozen=True, kw_only=True)
class Decisive(Study):
    """Whether accuracy follows the dead-neuron rate or the removals."""

    title: ClassVar[str] = "Is it the dead neurons? The rate set by itself"
    claim: ClassVar[str] = (
        "AP helps because fewer neurons are dead (the published explanation; Liu, Ghosh & Motani 2023). Then a network "
        "without AP's removals that is given AP's dead-neuron rate must gain what AP gains, and one with AP's removals "
        "that is given the rate of none must lose it."
    )
    setting: ClassVar[str] = (
        "Iterative magnitude pruning with rewinding, without AP and with lite, gives two tickets of equal density in "
        "each cycle. Each is trained from its rewound weights as it is, and once more with its rates set to those that "
        "the other had at the same point of its training: at ten points (before the first step and after every tenth "
        "of the training) the biases of each layer (BatchNorm's β where there is one) are shifted by one number until "
        "the layer's total rate on 500 training images is the wanted one. The ticket without AP is also trained with "
        "its own rates raised and lowered. Rates reported are of the trained networks on held-out images. An MLP "
        "(LeNet-300-100, 10,000 Fashion-MNIST images), a CNN without BatchNorm and a ResNet-20 of half the width with "
        "it (10,000 CIFAR-10 images of 16 × 16 pixels). Differences are the mean over the densities, paired by seed; "
        "fixed before the runs."
    )

    networks: tuple[str, ...] = ("mlp", "cnn", "resnet")
    """mlp, cnn, resnet, vgg."""
    seeds: int = 10
    """Seeds of each network but the ResNet."""
    resnet_seeds: int = 3
    """Seeds of the ResNet, which takes ten times as long."""
    doses: tuple[float, ...] = (-0.2, -0.1, 0.1)
    """What is added to every layer's own rate, for the ticket without AP."""
    digits: bool = False
    """Small networks on handwritten digits instead, for a quick look."""

    @classmethod
    def quick(cls, **options: object) -> Decisive:
        return cls(**{"networks": ("cnn",), "seeds": 2, "doses": (-0.1,), "digits": True, **options})  # type: ignore[arg-type]

    def measure(self, journal: Journal) -> Data:
        counts = {name: self.resnet_seeds if name == "resnet" else self.seeds for name in self.networks}
        seeds = {name: range(self.seed, self.seed + count) for name, count in counts.items()}
        return tickets.measured(journal, seeds, self.digits, _measure, self.doses)

    @classmethod
    def tables(cls, data: Data) -> list[Table]:
        return tickets.tables(data)

    @classmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        found = []
        for network, rows in data.items():
            whole = against(rows, "accuracy", "AP")
            rate = against(rows, "accuracy", RATE_ONLY)
            removals = against(rows, "accuracy", REMOVALS_ONLY)
            set_ = intervals.paired(by_seed(rows, "total", RATE_ONLY), by_seed(rows, "total", "AP"))
            less = -against(rows, "total", "AP")
            found += [
                above(f"{network}: AP lowers the total rate", less, f"by {less.text(3)}"),
                above(f"{network}: AP raises accuracy", whole, f"{whole.text()} points"),
                above(
                    f"{network}: AP's rate alone raises accuracy",
                    rate,
                    f"{rate.text()} points, at a rate that differs from AP's by {set_.text(3)} after training",
                ),
                above(f"{network}: AP's removals alone raise accuracy", removals, f"{removals.text()} points"),
            ]
        return found

    @classmethod
    def plot(cls, data: Data, figure: Figure) -> None:
        tickets.plot(data, figure)
