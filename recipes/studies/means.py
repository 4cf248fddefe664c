"""Whether AP works through the shift of the mean pre-activations that its removals cause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from recipes.config import Experiment
from recipes.studies import intervals, tickets
from recipes.studies.base import Data, Journal, Study, Table, Verdict, above, register
from recipes.studies.tickets import Bench, against, by_seed, rows_of, signal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANS_ONLY = "none, at AP's means"
MEANS_KEPT = "AP, at the means of none"
NONE_RESTORED = "none, signal restored"
AP_RESTORED = "AP, signal restored"


def _measure(config: Experiment, data: Any, seed: int) -> list[Data]:
    bench = Bench(config, data, seed)
    rows_none, tickets_none, _ = bench.trajectory("none")
    rows_ap, tickets_ap, _ = bench.trajectory("lite")
    rows: list[Data] = []
    for cycle in range(1, min(len(rows_none), len(rows_ap))):
        none, ap = tickets_none[cycle], tickets_ap[cycle]
        arms = {
            "none": rows_none[cycle] | {"start": signal(bench.rewound(none)[0], bench.probe)},
            "AP": rows_ap[cycle] | {"start": signal(bench.rewound(ap)[0], bench.probe)},
            MEANS_ONLY: bench.with_means_of(ap, none, cycle),
            MEANS_KEPT: bench.with_means_of(none, ap, cycle),
            NONE_RESTORED: bench.with_signal_of_dense(none, cycle),
            AP_RESTORED: bench.with_signal_of_dense(ap, cycle),
        }
        rows += rows_of(arms, seed, cycle)
    return rows


@register("means")
@dataclass(frozen=True, kw_only=True)
class Means(Study):
    """Whether accuracy follows the shift of the means or the removals."""

    title: ClassVar[str] = "Is it the shift of the means? Biases set once, before the first step"
    claim: ClassVar[str] = (
        "Removing negative weights behind a ReLU raises the mean pre-activation of the neurons they feed: this is how "
        "AP wakes them, and by our conjecture also how it harms a deep network without normalisation. Then a ticket "
        "of AP whose means are set back loses what AP does, good or bad, and a ticket without AP that is given "
        "AP's means shows it. Pruning also shrinks the signal from layer to layer; if what AP does is to change that, "
        "then nothing is left of it between tickets whose signal is restored."
    )
    setting: ClassVar[str] = (
        "Iterative magnitude pruning with rewinding, without AP and with lite, gives two tickets of equal density in "
        "each cycle. Each is trained from its rewound weights as it is; once more after the bias of every neuron "
        "or channel before an activation was shifted, layer by layer, so that its mean pre-activation on 500 training "
        "images is what it is in the other ticket; and once more with its *signal restored*: every layer scaled by "
        "one number and every bias shifted, so that the spread of the layer and the mean of each unit are those of "
        "the network before any pruning. Unlike setting rates ten times during training (the decisive study), this "
        "happens once, before the first step, and training then goes its own way. An MLP (LeNet-300-100, 10,000 "
        "Fashion-MNIST images), a CNN of three layers and a VGG-11 of an eighth of the width, both without BatchNorm "
        "(10,000 CIFAR-10 images). Differences are the mean over the densities, paired by seed; fixed before the runs."
    )

    networks: tuple[str, ...] = ("mlp", "cnn", "vgg")
    """mlp, cnn, vgg."""
    seeds: int = 10
    """Seeds of the MLP and the CNN."""
    deep_seeds: int = 3
    """Seeds of the VGG, which takes longer."""
    digits: bool = False
    """Small networks on handwritten digits instead, for a quick look."""

    @classmethod
    def quick(cls, **options: object) -> Means:
        return cls(**{"networks": ("cnn",), "seeds": 2, "digits": True, **options})  # type: ignore[arg-type]

    def measure(self, journal: Journal) -> Data:
        if "resnet" in self.networks:
            raise ValueError(
                "--networks: mlp, cnn or vgg; the layers of a resnet add up, and none sets its sum's spread"
            )
        counts = {name: self.deep_seeds if name == "vgg" else self.seeds for name in self.networks}
        seeds = {name: range(self.seed, self.seed + count) for name, count in counts.items()}
        return tickets.measured(journal, seeds, self.digits, _measure)

    @classmethod
    def tables(cls, data: Data) -> list[Table]:
        return [*tickets.tables(data), *(_starts(network, rows) for network, rows in data.items())]

    @classmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        found = []
        for network, rows in data.items():
            whole, shifted = (against(rows, "accuracy", arm) for arm in ("AP", MEANS_ONLY))
            lost = intervals.paired(by_seed(rows, "accuracy", "AP"), by_seed(rows, "accuracy", MEANS_KEPT))
            left = intervals.paired(*(by_seed(rows, "accuracy", arm) for arm in (AP_RESTORED, NONE_RESTORED)))
            # What is claimed is that the shift has AP's effect, whichever sign that has.
            gains = whole.mean >= 0
            effect = "raises" if gains else "lowers"
            for what, change in (
                (f"AP {effect} accuracy", whole),
                (f"AP's means alone, without its removals: {effect} accuracy", shifted),
                (f"AP {effect} accuracy among tickets with their signal restored", left),
                ("setting the means back takes AP's effect away: AP less AP at the means of none", lost),
            ):
                found.append(above(f"{network}: {what}", change if gains else -change, f"{change.text()} points"))
        return found

    @classmethod
    def plot(cls, data: Data, figure: Figure) -> None:
        tickets.plot(data, figure)


def _starts(network: str, rows: list[Data]) -> Table:
    """Pre-activations before the first step, layer by layer, at the first density."""
    rows = [row for row in rows if row["cycle"] == 1]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = []
    for layer in rows[0]["start"]:
        starts = {arm: [row["start"][layer] for row in rows if row["arm"] == arm] for arm in arms}
        lines.append(
            [layer, *(" ± ".join(f"{sum(x) / len(x):.2f}" for x in zip(*starts[a], strict=True)) for a in arms)]
        )
    title = (
        f"{network}: mean and standard deviation of each layer's pre-activations before the first step, "
        f"at {100 * rows[0]['density']:.1f} % of the weights (averaged over seeds)"
    )
    return Table(title, ["layer", *arms], lines)
