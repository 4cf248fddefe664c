"""What a monitor has counted: a tally that adds up across passes, windows and ranks.  [ours]"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ap.dnr_count import Counts
from ap.dnr_report import DNRReport, LayerDNR, rates_of
from ap.dnr_watch import Seen

_PARTS = ("alive", "learning")


class LayerTally:
    """One activation: for how many inputs its units were alive and, where that differs, got a gradient."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.can_die: bool | Tensor = False  # a tensor until somebody has to know
        self.alive: Counts | None = None
        self.learning: Counts | None = None

    def add(self, seen: Seen) -> None:
        """Adds one call."""
        if self.alive is None:
            self.alive = Counts(seen.shape, seen.device)
        self.can_die |= seen.hits is not None if seen.can_die is None else seen.can_die
        self.alive.add_batch(seen.shape, seen.hits, seen.batch, seen.counted_dead)
        if seen.gradient_hits is not None:
            if self.learning is None:
                self.learning = Counts(seen.shape, seen.device)
            self.learning.add_batch(seen.shape, seen.gradient_hits, seen.batch, counted_dead=True)

    def settle(self) -> bool:
        """Whether the activation can die, read from the device where only that knows."""
        self.can_die = bool(self.can_die)
        return self.can_die

    def merge(self, other: LayerTally) -> None:
        """Adds another tally of the same activation, which stays as it is."""
        self.can_die |= other.can_die
        for part in _PARTS:
            mine, theirs = getattr(self, part), getattr(other, part)
            if mine is None:
                setattr(self, part, None if theirs is None else theirs.clone())
            elif theirs is not None:
                mine.merge(theirs)


class Tally:
    """All activations of a model, over some passes of one kind."""

    def __init__(self) -> None:
        self.passes = 0
        self.layers: dict[str, LayerTally] = {}

    def add_pass(self, calls: Iterable[Seen]) -> None:
        """Adds one observed pass. Calls on nothing, such as a detector's head without proposals, have no rates."""
        self.passes += 1
        for seen in calls:
            if seen.batch and seen.shape.numel():
                self.layers.setdefault(seen.name, LayerTally(seen.kind)).add(seen)

    def merge(self, other: Tally) -> None:
        """Adds another tally, which stays as it is."""
        self.passes += other.passes
        for name, layer in other.layers.items():
            self.layers.setdefault(name, LayerTally(layer.kind)).merge(layer)

    def all_reduce(self, device: torch.device) -> Tally:
        """The sum of all ranks' tallies; collective.

        Ranks first tell each other what they hold, since one may have seen other sizes or nothing at all; then one
        tensor with every number is summed.
        """
        mine = {
            name: (layer.kind, layer.settle(), *(None if c is None else c.form for c in (layer.alive, layer.learning)))
            for name, layer in self.layers.items()
        }
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
        result = Tally()
        flat: list[Tensor] = [torch.tensor([self.passes], device=device)]
        for forms in everyones:
            for name, (kind, can_die, *parts) in forms.items():
                layer = result.layers.setdefault(name, LayerTally(kind))
                layer.can_die |= can_die
                for part, form in zip(_PARTS, parts, strict=True):
                    if form is not None:
                        counts = getattr(layer, part)
                        if counts is None:
                            setattr(layer, part, Counts.of_form(form, device))
                        else:
                            counts.merge(Counts.of_form(form, device))
        slots = [
            counts for layer in result.layers.values() for counts in (layer.alive, layer.learning) if counts is not None
        ]
        for name, layer in result.layers.items():
            own = self.layers.get(name)
            for part in _PARTS:
                counts = getattr(layer, part)
                if counts is not None:
                    held = getattr(own, part, None)
                    if held is not None:
                        counts.merge(held)
                    flat.append(counts.alive.reshape(-1).to(device, torch.int64))
                    flat.append(torch.tensor([counts.inputs, counts.samples], device=device))
        summed = torch.cat(flat)
        dist.all_reduce(summed)
        result.passes = int(summed[0])
        position = 1
        for counts in slots:
            size = counts.alive.numel()
            counts.alive = summed[position : position + size].reshape(counts.alive.shape).clone()
            counts.inputs, counts.samples = (int(value) for value in summed[position + size : position + size + 2])
            position += size + 2
        return result

    def report(self, mode: str | None) -> DNRReport:
        """The rates, in one read from the device.

        Raises:
            ValueError: no pass was observed, or nothing in the model can die.
        """
        if self.passes == 0:
            kind = f"{mode} " if mode else ""
            raise ValueError(
                f"no {kind}pass was observed: call the model itself, not its submodules, between attach() and detach()"
            )
        names = [name for name, layer in self.layers.items() if layer.settle()]
        if not names:
            kinds = ", ".join(sorted({layer.kind for layer in self.layers.values()}))
            why = (
                f"its activations ({kinds}) cannot"
                if kinds
                else "no activation was called with any input in the passes observed"
            )
            raise ValueError(f"nothing in this model can die: {why}")
        learning = {name: layer.learning for name, layer in self.layers.items() if layer.learning is not None}
        mortal = [layer.alive for layer in self.layers.values() if layer.can_die and layer.alive is not None]
        values = list(rates_of([*mortal, *learning.values()]))
        rates = dict(zip(names, values, strict=False))
        no_gradient = dict(zip(learning, values[len(names) :], strict=True))
        layers = {}
        for name, layer in self.layers.items():
            assert layer.alive is not None
            total, static = rates.get(name, (None, None))
            layers[name] = LayerDNR(
                name=name,
                kind=layer.kind,
                units=layer.alive.alive.numel(),
                samples=layer.alive.samples,
                total=total,
                static=static,
                dynamic=None if total is None or static is None else total - static,
                can_die=bool(layer.can_die),
                gradient_total=no_gradient.get(name, (None, None))[0],
                gradient_static=no_gradient.get(name, (None, None))[1],
                unit=layer.alive.unit,
                counts=layer.alive,
            )
        return DNRReport(layers, mode, self.passes)
