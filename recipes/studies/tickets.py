"""Tickets of iterative pruning, trained again with their dead-neuron rates or mean pre-activations set by biases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import pruners
from ap import Masks, measure_dnr
from ap.activations import is_activation
from ap.cycles import Cycles, Run
from pruners.base import undisturbed
from recipes.answers.plans import CNN, RESNET, SMALL_MLP, VGG
from recipes.config import Experiment
from recipes.engine import Engine
from recipes.experiment import build, load_data
from recipes.studies import intervals
from recipes.studies.base import Data, Journal, Table
from recipes.studies.lockstep import values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROBE = 500  # training images on which biases are set
NETWORKS: dict[str, Experiment] = {"mlp": SMALL_MLP, "cnn": CNN, "resnet": RESNET, "vgg": VGG}
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
    with undisturbed(model):
        for name, owner in _biases(model, images).items():
            if name in targets:
                z = _pre_activations(model, images, [name])[name]
                owner.bias += _shift(z.flatten(), targets[name])  # type: ignore[operator]


@torch.no_grad()
def set_means_(model: nn.Module, images: Tensor, targets: Mapping[str, Tensor]) -> None:
    """Shifts the bias of every unit before an activation until the mean of its pre-activation is the wanted one.

    One number a neuron or channel, in the same biases and the same order as `set_rates_`.

    Args:
        model: with activations as modules of their own.
        images: [N, C, H, W], on the model's device.
        targets: means [channels] by the activation's dotted module path, as `means` gives them.
    """
    with undisturbed(model):
        for name, owner in _biases(model, images).items():
            z = _pre_activations(model, images, [name])[name]
            owner.bias += targets[name] - _mean(z)  # type: ignore[operator]


@torch.no_grad()
def set_signal_(model: nn.Module, images: Tensor, like: nn.Module) -> None:
    """Gives every unit the mean, and every layer the spread, of its pre-activations in another network.

    Layers are set in the order they run: first the weights and biases before an activation are multiplied by one number
    until the standard deviation of its pre-activations around their units' means is the wanted one, then each unit's
    bias is shifted as `set_means_` does. (In the manner of the layer-sequential unit-variance initialisation of Mishkin
    and Matas 2016, with a network's own values in the place of 0 and 1.) Without residual sums, which one layer's
    weights do not scale.

    Args:
        model, like: of the same architecture, with activations as modules of their own.
        images: [N, C, H, W], on the models' device.
    """
    with undisturbed(like), undisturbed(model):
        owners = _biases(model, images)
        wanted = _pre_activations(like, images, owners)
        for name, owner in owners.items():
            found = _pre_activations(model, images, [name])[name]
            factor = _spread(wanted[name]) / _spread(found)
            for parameter in owner.parameters():
                parameter.mul_(factor)
            owner.bias += _mean(wanted[name]) - factor * _mean(found)  # type: ignore[operator]


@torch.no_grad()
def means(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The mean pre-activation of every channel on these images, by the activation's dotted module path."""
    return {name: _mean(z) for name, z in _all_pre_activations(model, images).items()}


@torch.no_grad()
def signal(model: nn.Module, images: Tensor) -> dict[str, list[float]]:
    """Mean and standard deviation of all pre-activations of a layer, by the activation's dotted module path."""
    seen = _all_pre_activations(model, images)
    return {name: [round(float(z.mean()), 5), round(float(z.std()), 5)] for name, z in seen.items()}


def _mean(z: Tensor) -> Tensor:
    return z.transpose(0, 1).flatten(1).mean(1)


def _spread(z: Tensor) -> Tensor:
    units = z.transpose(0, 1).flatten(1)
    return (units - units.mean(1, keepdim=True)).square().mean().sqrt()


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


def _all_pre_activations(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with undisturbed(model):
        return _pre_activations(model, images, _biases(model, images))


def _pre_activations(model: nn.Module, images: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """What these activations are given, from one pass; of one that is called several times, the first time."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def note(module: nn.Module, inputs: Any, name: str = name) -> None:
            if name not in seen:
                seen[name] = inputs[0].clone()

        handles.append(model.get_submodule(name).register_forward_pre_hook(note))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class Bench:
    """One network and seed: what all of its trainings share.

    Args:
        config: of the network and its pruning.
        data: its images.
        seed: of everything.
    """

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

    def rewound(self, ticket: dict[str, Tensor]) -> tuple[nn.Module, Masks]:
        """The network at its initial weights, those of this ticket alive."""
        model = self.model()
        masks = Masks(model)
        masks.remove({name: ~alive for name, alive in ticket.items()})
        return model, masks

    def with_means_of(self, other: dict[str, Tensor], ticket: dict[str, Tensor], cycle: int) -> dict[str, Any]:
        """Trains this ticket, its units' mean pre-activations set before the first step to those of the other."""
        model, masks = self.rewound(ticket)
        set_means_(model, self.probe, means(self.rewound(other)[0], self.probe))
        return self._fit_once(model, masks, cycle)

    def with_signal_of_dense(self, ticket: dict[str, Tensor], cycle: int) -> dict[str, Any]:
        """Trains this ticket, its signal set before the first step to that of the network before any pruning."""
        model, masks = self.rewound(ticket)
        set_signal_(model, self.probe, self.model())
        return self._fit_once(model, masks, cycle)

    def _fit_once(self, model: nn.Module, masks: Masks, cycle: int) -> dict[str, Any]:
        start = signal(model, self.probe)
        return self.fit(model, masks, cycle, lambda step: None) | {"start": start}

    def again(self, ticket: dict[str, Tensor], record: Record, cycle: int, by: float = 0.0) -> dict[str, Any]:
        """Trains this ticket with the layers' rates set to the recorded ones plus `by`, ten times on the way."""
        model, masks = self.rewound(ticket)

        def set_(step: int) -> None:
            set_rates_(model, self.probe, {n: min(max(r + by, 0.0), 1.0) for n, r in record[step].items()})

        return self.fit(model, masks, cycle, set_)


def rows_of(arms: dict[str, dict[str, Any]], seed: int, cycle: int) -> list[Data]:
    """What is kept of the trainings of one ticket, a row an arm."""
    kept = ("accuracy", "val_accuracy", "total", "layers", "start")
    density = arms["none"]["density"]
    return [
        {"arm": arm, "seed": seed, "cycle": cycle, "density": density, **{k: row[k] for k in kept if k in row}}
        for arm, row in arms.items()
    ]


def by_seed(rows: list[Data], key: str, arm: str) -> list[float]:
    """The mean over all densities, for each seed."""
    seeds = sorted({row["seed"] for row in rows})
    means = []
    for seed in seeds:
        chosen = [row[key] for row in rows if row["seed"] == seed and row["arm"] == arm]
        means.append(sum(chosen) / len(chosen))
    return means


def against(rows: list[Data], key: str, arm: str) -> intervals.Interval:
    return intervals.paired(by_seed(rows, key, arm), by_seed(rows, key, "none"))


def tables(data: Data) -> list[Table]:
    """Each arm against none, in the mean over all densities and for each of them."""
    tables = []
    for network, rows in data.items():
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        lines = [
            [
                arm,
                intervals.mean(by_seed(rows, "total", arm)).text(3),
                against(rows, "total", arm).text(3) if arm != "none" else "–",
                intervals.mean(by_seed(rows, "accuracy", arm)).text(),
                against(rows, "accuracy", arm).text() if arm != "none" else "–",
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


def plot(data: Data, figure: Figure) -> None:
    """Change in accuracy over change in rate, a panel a network."""
    for axes, (network, rows) in zip(figure.subplots(1, len(data), squeeze=False)[0], data.items(), strict=True):
        for i, arm in enumerate(list(dict.fromkeys(row["arm"] for row in rows))[1:]):
            x, y = against(rows, "total", arm), against(rows, "accuracy", arm)
            axes.errorbar(
                x.mean, y.mean, [[y.mean - y.low], [y.high - y.mean]], [[x.mean - x.low], [x.high - x.mean]],
                fmt="o", color=f"C{i}", label=arm, capsize=2,
            )  # fmt: skip
        axes.axhline(0, color="0.8", zorder=0)
        axes.axvline(0, color="0.8", zorder=0)
        axes.set(title=network, xlabel="total rate against none")
    figure.axes[0].set_ylabel("accuracy against none, points")
    figure.axes[0].legend(fontsize="x-small")


def measured(
    journal: Journal, seeds: Mapping[str, range], digits: bool, measure: Callable[..., list[Data]], *options: Any
) -> Data:
    """The rows of each network, from `measure(config, data, seed, *options)` for each of its seeds.

    Args:
        journal: keeps what is done.
        seeds: by the network's name.
        digits: small versions on handwritten digits instead, for a quick look.

    Raises:
        ValueError: there is no network of this name.
    """
    result: Data = {}
    for name, its in seeds.items():
        if name not in NETWORKS:
            raise ValueError(f"--networks: {name!r} is none of {', '.join(NETWORKS)}")
        config = NETWORKS[name]
        if digits:
            config = replace(
                config, data="digits", image_size=None, train_images=None, batch_size=50, cycles=2, epochs=2
            )
        data = load_data(config)
        result[name] = [
            row for seed in its for row in journal.cell(f"{name} {seed}", measure, config, data, seed, *options)
        ]
    return result
