"""The decisive experiment: the dead-neuron rate set by itself, without AP's removals, and AP's removals without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

import pruners
from ap import Masks, measure_dnr
from ap.activations import is_activation
from ap.cycles import Cycles, Run
from recipes.answers.plans import CNN, RESNET, SMALL_MLP
from recipes.config import Experiment
from recipes.engine import Engine
from recipes.experiment import build, load_data
from recipes.studies import intervals
from recipes.studies.base import Data, Journal, Study, Table, Verdict, above, register
from recipes.studies.lockstep import values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROBE = 500  # training images on which rates are set
NETWORKS: dict[str, Experiment] = {"mlp": SMALL_MLP, "cnn": CNN, "resnet": RESNET}
RATE_ONLY = "none, at AP's rate"
REMOVALS_ONLY = "AP, at the rate of none"
Rates = dict[str, float]
Record = dict[int, Rates]  # step: the layers' rates


@torch.no_grad()
def set_rates_(model: nn.Module, images: Tensor, targets: Mapping[str, float]) -> None:
    """Shifts biases until each activation is dead as often as asked for on these images, one number a layer.

    What is shifted is the bias of the last module before the activation that has one: BatchNorm's β where there is
    one, the layer's own otherwise. Layers are set in the order they run, each seeing the ones before as they were set.
    Pre-activations that are exactly equal move together: the rate is then the nearest that can be had.

    Args:
        model: with ReLUs as modules of their own.
        images: [N, C, H, W], on the model's device.
        targets: total rate in [0, 1] by the activation's dotted module path.

    Example:
        >>> torch.manual_seed(0); model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        <torch._C.Generator object at ...>
        >>> x = torch.randn(100, 8)
        >>> set_rates_(model, x, {"1": 0.75})
        >>> round(measure_dnr(model, [x]).total, 3)
        0.75
    """
    training = model.training
    model.eval()
    try:
        for name, owner in _biases(model, images).items():
            if name in targets:
                z = _pre_activation(model, name, images)
                owner.bias += _shift(z.flatten(), targets[name])  # type: ignore[operator]
    finally:
        model.train(training)


def _shift(z: Tensor, rate: float) -> Tensor:
    """What to add to z so that this share of it is ≤ 0: half-way between the two values that it falls between."""
    z = z.sort().values
    dead = min(max(round(rate * len(z)), 0), len(z))
    if dead == 0:
        return 1e-6 * z[0].abs().clamp(min=1) - z[0]
    if dead == len(z):
        return -z[-1]
    return -(z[dead - 1] + z[dead]) / 2


def _biases(model: nn.Module, images: Tensor) -> dict[str, nn.Module]:
    """For each activation, in the order they run, the last module before it that has a bias."""
    found: dict[str, nn.Module] = {}
    last: list[nn.Module] = []
    handles = []
    for name, module in model.named_modules():

        def note(module: nn.Module, inputs: Any, name: str = name) -> None:
            if is_activation(module) and last:
                found[name] = last[-1]
            elif isinstance(getattr(module, "bias", None), nn.Parameter):
                last.append(module)

        if not list(module.children()):
            handles.append(module.register_forward_pre_hook(note))
    try:
        model(images[:2])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _pre_activation(model: nn.Module, name: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    try:
        model(images)
    finally:
        handle.remove()
    return seen[0]


class _Bench:
    """One network and seed: what all of its trainings share."""

    def __init__(self, config: Experiment, data: Any, seed: int) -> None:
        self.config, self.data, self.seed = config, data, seed
        self.engine = Engine(config, data, seed)
        self.probe = next(self.engine.train_set.batches(size=PROBE))[0]
        total = config.epochs * self.engine.steps_per_epoch
        self.marks = {round(total * part / 10) for part in range(10)}

    def model(self) -> nn.Module:
        return self.engine.prepare(build(self.config, self.data, self.seed))

    def fit(self, model: nn.Module, masks: Masks, cycle: int, at: Callable[[int], None]) -> dict[str, Any]:
        """One training, `at(step)` being called at ten points of it; what became of the network."""
        training = self.engine.training(model, 0, cycle)
        handle = masks.bind(training.optimizer)

        def after(step: int) -> None:
            if step in self.marks:
                at(step)

        try:
            at(0)
            while not training.done:
                training.run_epoch(after)
        finally:
            handle.remove()
        assert self.engine.val_set is not None
        report = measure_dnr(model, self.engine.probe_batches())
        return {
            "accuracy": 100 * self.engine.evaluate(model, self.engine.test_set)[0],
            "val_accuracy": 100 * self.engine.evaluate(model, self.engine.val_set)[0],
            "total": report.total,
            "layers": {n: layer.total for n, layer in report.layers.items()},
        }

    def rates(self, model: nn.Module) -> Rates:
        report = measure_dnr(model, [self.probe])
        return {name: layer.total for name, layer in report.layers.items() if layer.total is not None}

    def trajectory(self, variant: str) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]], list[Record]]:
        """Iterative pruning: rows, masks, and the rates at the ten points, of each trained network."""
        model = self.model()
        tickets: list[dict[str, Tensor]] = []
        records: list[Record] = []

        def train(model: nn.Module, masks: Masks, run: Run) -> dict[str, Any]:
            record: Record = {}
            tickets.append({name: masks[name].clone() for name in masks})
            records.append(record)
            return self.fit(model, masks, run.cycle, lambda step: record.update({step: self.rates(model)}))

        config = self.config
        loop = Cycles(
            model,
            pruners.create("magnitude"),
            cycles=config.cycles,
            amount=config.amount,
            rate=config.rate,
            ap=variant,
            seed=self.seed,
        )
        return loop.run(train), tickets, records

    def again(self, ticket: dict[str, Tensor], record: Record, cycle: int, by: float = 0.0) -> dict[str, Any]:
        """Trains this ticket with the layers' rates set to the recorded ones plus `by`, ten times on the way."""
        model = self.model()
        masks = Masks(model)
        masks.remove({name: ~alive for name, alive in ticket.items()})

        def set_(step: int) -> None:
            set_rates_(model, self.probe, {n: min(max(r + by, 0.0), 1.0) for n, r in record[step].items()})

        return self.fit(model, masks, cycle, set_)


def _measure(config: Experiment, data: Any, seed: int, doses: tuple[float, ...]) -> list[Data]:
    bench = _Bench(config, data, seed)
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
        kept = ("accuracy", "val_accuracy", "total", "layers")
        density = rows_none[cycle]["density"]
        rows += [
            {"arm": arm, "seed": seed, "cycle": cycle, "density": density, **{key: row[key] for key in kept}}
            for arm, row in arms.items()
        ]
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
    """mlp, cnn, resnet."""
    seeds: int = 10
    """Seeds of the MLP and the CNN."""
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
        result: Data = {}
        for name in self.networks:
            if name not in NETWORKS:
                raise ValueError(f"--networks: {name!r} is none of {', '.join(NETWORKS)}")
            config = NETWORKS[name]
            if self.digits:
                small = {
                    "data": "digits",
                    "image_size": None,
                    "train_images": None,
                    "batch_size": 50,
                    "cycles": 2,
                    "epochs": 2,
                }
                config = replace(config, **small)  # type: ignore[arg-type]
            data = load_data(config)
            seeds = range(self.seed, self.seed + (self.resnet_seeds if name == "resnet" else self.seeds))
            result[name] = [
                row
                for seed in seeds
                for row in journal.cell(f"{name} {seed}", _measure, config, data, seed, self.doses)
            ]
        return result

    @classmethod
    def tables(cls, data: Data) -> list[Table]:
        tables = []
        for network, rows in data.items():
            arms = list(dict.fromkeys(row["arm"] for row in rows))
            lines = [
                [
                    arm,
                    intervals.mean(_by_seed(rows, "total", arm)).text(3),
                    _against(rows, "total", arm).text(3) if arm != "none" else "–",
                    intervals.mean(_by_seed(rows, "accuracy", arm)).text(),
                    _against(rows, "accuracy", arm).text() if arm != "none" else "–",
                ]
                for arm in arms
            ]
            columns = ["arm", "total rate", "against none", "accuracy, %", "against none, points"]
            tables.append(Table(f"{network}: means over all densities", columns, lines))
            cycles = sorted({row["cycle"] for row in rows})
            lines = [
                [
                    f"{100 * values(rows, 'density', arm='none', cycle=cycle)[0]:.1f} %",
                    *(
                        intervals.paired(
                            values(rows, "accuracy", arm=arm, cycle=cycle),
                            values(rows, "accuracy", arm="none", cycle=cycle),
                        ).text()
                        for arm in arms[1:]
                    ),
                ]
                for cycle in cycles
            ]
            title = f"{network}: accuracy against none by density, points"
            tables.append(Table(title, ["density", *arms[1:]], lines))
        return tables

    @classmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        found = []
        for network, rows in data.items():
            whole = _against(rows, "accuracy", "AP")
            rate = _against(rows, "accuracy", RATE_ONLY)
            removals = _against(rows, "accuracy", REMOVALS_ONLY)
            set_ = intervals.paired(_by_seed(rows, "total", RATE_ONLY), _by_seed(rows, "total", "AP"))
            fallen = _against(rows, "total", "AP")
            less = intervals.Interval(-fallen.mean, -fallen.high, -fallen.low, fallen.n)
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
        for axes, (network, rows) in zip(figure.subplots(1, len(data), squeeze=False)[0], data.items(), strict=True):
            for i, arm in enumerate(list(dict.fromkeys(row["arm"] for row in rows))[1:]):
                x, y = _against(rows, "total", arm), _against(rows, "accuracy", arm)
                axes.errorbar(
                    x.mean, y.mean, [[y.mean - y.low], [y.high - y.mean]], [[x.mean - x.low], [x.high - x.mean]],
                    fmt="o", color=f"C{i}", label=arm, capsize=2,
                )  # fmt: skip
            axes.axhline(0, color="0.8", zorder=0)
            axes.axvline(0, color="0.8", zorder=0)
            axes.set(title=network, xlabel="total rate against none")
        figure.axes[0].set_ylabel("accuracy against none, points")
        figure.axes[0].legend(fontsize="x-small")


def _by_seed(rows: list[Data], key: str, arm: str) -> list[float]:
    """The mean over all densities, for each seed."""
    seeds = sorted({row["seed"] for row in rows})
    means = []
    for seed in seeds:
        chosen = [row[key] for row in rows if row["seed"] == seed and row["arm"] == arm]
        means.append(sum(chosen) / len(chosen))
    return means


def _against(rows: list[Data], key: str, arm: str) -> intervals.Interval:
    return intervals.paired(_by_seed(rows, key, arm), _by_seed(rows, key, "none"))
