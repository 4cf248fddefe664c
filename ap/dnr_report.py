"""What a monitor reports: dead-neuron rates of layers and of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ap.dnr_count import Counts


class Rates(NamedTuple):
    """total = static + dynamic, each in [0, 1]."""

    total: float
    static: float
    dynamic: float


@dataclass(frozen=True)
class LayerDNR:
    """The dead-neuron rate of one activation.

    Over N inputs and U units: total = dead (unit, input) pairs / (N · U); static = units dead for all N / U [paper];
    dynamic = total − static.

    Attributes:
        name: its name: a module's path, or "path/function" for a functional call.
        kind: the module's class or the function's name.
        units: U: elements of its output without the batch axis, or channels where `unit` says so.
        samples: N, the number of samples seen.
        total, static, dynamic: rates in [0, 1]; None for an activation that cannot die.
        can_die: whether there are pre-activations for which it neither passes nor learns.  [ours]
        gradient_total, gradient_static: the rates of getting no gradient where these differ from being dead (HeLU),
            else None.  [ours]
        unit: "element", or "channel" where the positions changed in number, which then count as inputs.  [ours]
    """

    name: str
    kind: str
    units: int
    samples: int
    total: float | None
    static: float | None
    dynamic: float | None
    can_die: bool
    gradient_total: float | None = None
    gradient_static: float | None = None
    unit: str = "element"
    counts: Counts | None = field(default=None, repr=False, compare=False)

    def alive_counts(self) -> tuple[Tensor, int]:
        """For how many inputs each unit was alive, integers in the unit's shape, and the number of inputs N."""
        if self.counts is None or not self.can_die:
            raise ValueError(f"{self.name}: no counts are kept for an activation that cannot die")
        return self.counts.alive, self.counts.inputs

    def dead_rate_per_channel(self, axis: int | None = None) -> Tensor:
        """The share of (position, input) pairs for which each channel is dead, float32 [C].

        Args:
            axis: the channels' axis in the unit's shape; by default the first of [C, H, W], the last of [T, F].
        """
        alive, inputs = self.alive_counts()
        if alive.dim() == 0:
            alive = alive[None]
        if axis is None:
            axis = -1 if alive.dim() == 2 else 0
        channels = alive.movedim(axis, 0).flatten(1) if alive.dim() > 1 else alive[:, None]  # [C, positions]
        return (1 - channels.double().mean(1) / inputs).float()

    def to_dict(self) -> dict[str, Any]:
        """Its fields in plain types."""
        return {key: value for key, value in vars(self).items() if key != "counts"}


@dataclass(frozen=True)
class DNRReport:
    """Dead-neuron rates of a model.

    Attributes:
        layers: by name, in the order of execution.
        mode: "train" or "eval" for one kind of pass; None for both together.
        passes: how many forward passes were observed.

    `total`, `static` and `dynamic` are the model's rates: means over the layers that can die, weighted by their units;
    `mean_over_layers` is the plain mean.  `rows()` is what `pandas.DataFrame` reads.
    """

    layers: dict[str, LayerDNR]
    mode: str | None
    passes: int

    @property
    def total(self) -> float:
        """Dead (unit, input) pairs over all pairs."""
        return self.mean_over_units.total

    @property
    def static(self) -> float:
        """Units dead for every input seen, over all units."""
        return self.mean_over_units.static

    @property
    def dynamic(self) -> float:
        """total − static."""
        return self.mean_over_units.dynamic

    @property
    def mean_over_units(self) -> Rates:
        """The model's rates: the layers that can die, each weighted by its number of units."""
        return self._mean([layer.units for layer in self._mortal()])

    @property
    def mean_over_layers(self) -> Rates:
        """The plain mean over the layers that can die."""
        return self._mean([1 for _ in self._mortal()])

    def _mortal(self) -> list[LayerDNR]:
        return [layer for layer in self.layers.values() if layer.can_die and layer.samples]

    def _mean(self, weights: list[int]) -> Rates:
        layers, weight = self._mortal(), sum(weights)
        total = sum(w * (layer.total or 0.0) for w, layer in zip(weights, layers, strict=True)) / weight
        static = sum(w * (layer.static or 0.0) for w, layer in zip(weights, layers, strict=True)) / weight
        return Rates(total, static, total - static)

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a layer, as `pandas.DataFrame(report.rows())` reads them."""
        return [layer.to_dict() for layer in self.layers.values()]

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types, ready for JSON."""
        return {
            "mode": self.mode,
            "passes": self.passes,
            "total": self.total,
            "static": self.static,
            "dynamic": self.dynamic,
            "mean_over_layers": self.mean_over_layers._asdict(),
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
        }

    def __str__(self) -> str:
        with_gradient = any(layer.gradient_total is not None for layer in self.layers.values())
        header = ["layer", "activation", "units", "samples", "total", "static", "dynamic"]
        header += ["no gradient"] * with_gradient
        table = [header]
        for layer in self.layers.values():
            units = f"{layer.units:,}" + (" ch" if layer.unit == "channel" else "")
            rates = [_percent(rate) for rate in (layer.total, layer.static, layer.dynamic)]
            if not layer.can_die:
                rates = ["cannot die", "", ""]
            row = [layer.name, layer.kind, units, f"{layer.samples:,}", *rates]
            table.append(row + [_percent(layer.gradient_total)] * with_gradient)
        samples = max(layer.samples for layer in self._mortal())
        all_units = sum(layer.units for layer in self._mortal())
        by_units, by_layers = (
            [_percent(rate) for rate in mean] for mean in (self.mean_over_units, self.mean_over_layers)
        )
        table.append(["model (by units)", "", f"{all_units:,}", f"{samples:,}", *by_units] + [""] * with_gradient)
        table.append(["mean over layers", "", "", "", *by_layers] + [""] * with_gradient)
        lines = align(table, right=range(2, len(header)))
        notes = f"dead-neuron rates, {self.mode or 'training and evaluation'} passes: {self.passes}"
        if any(layer.unit == "channel" for layer in self.layers.values()):
            notes += "; ch: units are channels, because the number of positions changed"
        rule = "-" * max(len(line) for line in lines)
        return "\n".join([notes, lines[0], rule, *lines[1:-2], rule, *lines[-2:]])


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.2f} %"


def align(table: list[list[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows of cells as lines with columns of equal width, those in `right` flush right."""
    right = set(right)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def rates_of(counts: Iterable[Counts]) -> Iterator[tuple[float, float]]:
    """(total, static) of each layer, read from each device in one go."""
    counts = list(counts)
    pending: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for position, count in enumerate(counts):
        sums = torch.stack([count.alive.sum(dtype=torch.int64), (count.alive == 0).sum()])
        pending.setdefault(sums.device, []).append((position, sums))
    values: dict[int, tuple[int, int]] = {}
    for items in pending.values():
        for (position, _), row in zip(items, torch.stack([sums for _, sums in items]).tolist(), strict=True):
            values[position] = (row[0], row[1])
    for position, count in enumerate(counts):
        alive, static = values[position]
        units = count.alive.numel()
        pairs = units * count.inputs
        yield (pairs - alive) / pairs, static / units
