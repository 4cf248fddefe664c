"""AP: where the weights started, which ones to remove."""

from __future__ import annotations

import fnmatch
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim.optimizer import Optimizer

from ap import criteria
from ap.activations.ranges import dead_range, is_activation
from ap.criteria import BySign, Criterion, DecayTracker, Layer, layer_statistics
from ap.masks import Masks, check_count, check_share
from ap.names import close_names
from ap.ranking import Elementwise, LazyScores, count_true, lowest
from ap.slots import Handle, Kept, parameter_ids, zeros_of
from ap.steps import after_every_step
from ap.warn import warn

_SCHEMA = 1


class Selection(dict[str, Tensor]):
    """Weights chosen for removal: bool tensors by name, True = chosen."""

    @property
    def counts(self) -> dict[str, int]:
        """How many of each layer."""
        return {name: count_true(chosen) for name, chosen in self.items()}

    @property
    def total(self) -> int:
        """How many altogether."""
        return sum(self.counts.values())

    def overlap(self, other: Mapping[str, Tensor]) -> float:
        """The share of these weights that `other` has chosen too, in [0, 1]; NaN when nothing is chosen here."""
        both = sum(count_true(chosen & other[name]) for name, chosen in self.items() if name in other)
        return both / self.total if self.total else float("nan")

    def __repr__(self) -> str:
        return f"Selection({self.total} weights: {', '.join(f'{n} {c}' for n, c in self.counts.items() if c)})"


class AP:
    """Activate-while-Pruning (Liu, Ghosh, Motani 2023): beside your pruner, removes weights that keep neurons dead.

    Of the weights that are alive and negative after training, those that training moved least go: the input of a layer
    behind a rectifier is never negative, so a negative weight can only push a pre-activation down, and a unit that is
    dead gets no gradient, so its weights hardly move.

    From the first `cycle()` or `mark_start()` until `detach()`, any optimizer that steps the model's parameters keeps
    dead weights (and their momentum) at zero.

    Args:
        model: the model, or its `Masks`. A model that torch.nn.utils.prune has pruned is understood: its `weight_mask`
            buffers are read and updated.
        rate: q, the share of the weights alive at the start of a cycle that AP removes, in (0, 1).
        criterion: a name from `ap.criteria.names()` or a function `(Layer) -> scores`.
        where: "all", "rectified" (only layers whose input is rectified and whose output feeds an activation that can
            die), or names and globs of layers.
        allocation: "global", or "as-ap": from each layer as many as the paper's criterion would take there.
        batches: for criteria that measure (`most-waking`, `gentle-waking`): (inputs, targets) pairs that can be read
            repeatedly.
        example_input: helps to find the graph of a model that cannot be traced without.
        seed: for criteria that draw.

    Raises:
        ValueError: nothing to prune, a rate outside (0, 1), an unknown criterion or layer.
        TypeError: complex weights, which have no sign.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> plugin = AP(model, rate=0.05)
        >>> with plugin.cycle(amount=0.25) as share:
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     model(torch.rand(4, 8)).square().mean().backward()
        ...     _ = optimizer.step()
        ...     _ = plugin.masks.prune({n: plugin.masks.weight(n).abs() for n in plugin.masks}, amount=share)
        >>> plugin.masks.alive, plugin.masks.total
        (240, 320)
        >>> plugin.detach()
    """

    def __init__(
        self,
        model: nn.Module | Masks,
        rate: float = 0.02,
        criterion: str | Criterion = "least-moved-negative",
        where: str | Iterable[str] = "all",
        *,
        allocation: str = "global",
        batches: Iterable[Any] | None = None,
        example_input: Any = None,
        seed: int = 0,
    ) -> None:
        check_share(rate, "rate", 1)
        if allocation not in ("global", "as-ap"):
            raise ValueError(f"allocation must be 'global' or 'as-ap', not {allocation!r}")
        self.criterion = criteria.get(criterion)
        if criteria.measures(self.criterion) and batches is None:
            name = getattr(self.criterion, "__name__", "").replace("_", "-")
            raise ValueError(f"criterion={name!r} measures its inputs: give AP(..., batches=...)")
        self.masks = model if isinstance(model, Masks) else Masks(model)
        self.rate = rate
        self.allocation = allocation
        self.batches = batches
        self.example_input = example_input
        self.seed = seed
        self.where = where
        self.shortfall = 0  # how many the last activate() could not find
        self._names = self._resolve(where)
        odd = [name for name in self._names if self.masks.weight(name).is_complex()]
        if odd:
            raise TypeError(f"AP goes by the sign of weights; {odd[0]} is complex and has none: where= names others")
        self._start: dict[str, Tensor] = {}
        self._last_zero: dict[str, Tensor] = {}
        self._decay = DecayTracker()
        self._handles: list[Handle] = []
        self._in_cycle = False
        self._warned = False
        self.masks.on_resize(self._follow)

    @property
    def model(self) -> nn.Module:
        """The model that is pruned."""
        return self.masks.model

    @property
    def followed(self) -> list[Tensor]:
        """What each optimizer step changes in place, beside weights and the optimizer's state: which stayed at zero."""
        return list(self._last_zero.values())

    @contextmanager
    def cycle(self, amount: float = 0.2) -> Iterator[float]:
        """One pruning cycle: train and prune inside the block; leaving it removes rate × (alive at its start) more.

        Weights that became exactly zero inside the block, or that torch.nn.utils.prune masks, count as pruned; weights
        that were zero before do not. When the block raises, nothing is activated. A pruner that removed nothing, or
        AP's part too, is warned about.

        Args:
            amount: p, the share of what is alive that this cycle removes, AP's part included, in (0, 1).

        Yields:
            The share that is left for the pruner: (round(p·A) − round(q·A)) / A for A weights alive.

        Raises:
            ValueError: amount outside (0, 1), or a rate that is not below it.
        """
        if self._in_cycle:
            raise RuntimeError("this AP is inside a cycle already: leave it before the next one begins")
        self.warn_if_nothing_can_die()
        self.masks.from_torch_prune_()
        alive = self.masks.alive
        total, own = split(alive, amount, self.rate)
        self.mark_start()
        self._in_cycle = True
        try:
            yield (total - own) / alive
        finally:
            self._in_cycle = False
        self.absorb()
        _check_pruner(removed=alive - self.masks.alive, share=total - own, whole=total)
        self.activate(count=own)

    @torch.no_grad()
    def mark_start(self) -> None:
        """Remembers the weights as the start of a training run, and keeps dead weights dead from now on."""
        self.masks.from_torch_prune_()
        self.masks.apply_()
        if not self._handles:
            self._handles = [self.masks.hold(), _register(self)]
        self._start = {name: self.masks.weight(name).detach().clone() for name in self.masks}
        self._last_zero = {}
        for name, start in self._start.items():
            zero = zeros_of(start).logical_and_(self.masks[name])
            if count_true(zero):
                self._last_zero[name] = zero
        self._decay = DecayTracker()

    def __reduce__(self) -> Any:
        raise TypeError("AP belongs to a living model, and is neither copied nor pickled: AP(copy.deepcopy(masks))")

    def detach(self) -> None:
        """Lets go of the model: optimizers may revive dead weights from here on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def absorb(self) -> int:
        """Takes over what became zero, or was masked, since `mark_start()`; returns how many weights that were."""
        gone = self.masks.from_torch_prune_()
        dead = {}
        for name in self.masks:
            zero = zeros_of(self.masks.weight(name)).logical_and_(self.masks[name])
            if name in self._last_zero:  # zero at the start and after every step: never learned, not pruned
                zero &= ~self._last_zero[name]
            dead[name] = zero
        return gone + self.masks.remove(dead)

    def activate(self, count: int | None = None) -> Selection:
        """Removes the chosen weights and zeroes them.

        Args:
            count: k, how many; default round(rate × alive).

        Returns:
            What it removed, per layer. When fewer than `count` candidates are left, those go, with a warning, and
            `shortfall` says how many were missing.
        """
        chosen = self.preview(count)
        wanted = self._count(count)
        self.shortfall = wanted - chosen.total
        if self.shortfall:
            warn(
                f"AP found {chosen.total} of the {wanted} weights that it should remove: no further candidate is alive"
            )
        self.masks.remove(chosen)
        return chosen

    @torch.no_grad()
    def preview(self, count: int | None = None, criterion: str | Criterion | None = None) -> Selection:
        """What `activate()` would remove, without doing it; with `criterion`, what that one would."""
        k = self._count(count)
        function = self.criterion if criterion is None else criteria.get(criterion)
        if self.allocation == "as-ap" and function is not criteria.least_moved_negative:
            quotas = self._choose(criteria.least_moved_negative, self._names, k).counts
            chosen = Selection()
            for name, quota in quotas.items():
                chosen.update(self._choose(function, [name], quota))
            missing = k - chosen.total
            if missing:  # a layer had fewer candidates than AP takes there: the count stays equal all the same
                rest = self._choose(function, self._names, missing, leave_out=chosen)
                chosen = Selection({name: chosen[name] | rest[name] for name in chosen})
            return chosen
        return self._choose(function, self._names, k)

    def state_dict(self) -> dict[str, Any]:
        """Where this training started; the masks have a state of their own."""
        decay = {name: list(self._decay.state(self.masks.weight(name))) for name in self.masks}
        return {"schema": _SCHEMA, "start": dict(self._start), "last_zero": dict(self._last_zero), "decay": decay}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict()` was taken; dead weights stay dead from now on."""
        start, last_zero, decay = self.unpack(state)
        self.mark_start()
        self._start |= {name: tensor.to(self._start[name].device) for name, tensor in start.items()}
        self._last_zero = {name: zero.to(self._start[name].device) for name, zero in last_zero.items()}
        for name, (factor, momentum) in decay.items():
            self._decay.set_factor(self.masks.weight(name), factor, momentum)

    def unpack(self, state: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, tuple[float, float | None]]]:
        """The parts of a saved state; ValueError where it is damaged or another model's."""
        try:
            if state.get("schema", _SCHEMA) != _SCHEMA:
                raise ValueError(f"not an AP state of schema {_SCHEMA}")
            start, last_zero = dict(state["start"]), dict(state["last_zero"])
            decay = {name: (float(factor), momentum) for name, (factor, momentum) in state["decay"].items()}
            shapes = {name: self.masks.weight(name).shape for name in self.masks}
            for name in [*start, *last_zero, *decay]:
                if name not in shapes:
                    raise ValueError(f"{name}: the saved start is of another model")
            for name, tensor in [*start.items(), *last_zero.items()]:
                if not isinstance(tensor, Tensor) or tensor.shape != shapes[name] or tensor.is_meta:
                    raise ValueError(f"{name}: the saved start is of another model")
            for name, zero in last_zero.items():
                if zero.dtype != torch.bool:
                    raise ValueError(f"{name}: damaged AP state, zeros of type {zero.dtype}")
            for name, tensor in start.items():
                if tensor.dtype != self.masks.weight(name).dtype:
                    raise ValueError(f"{name}: damaged AP state, a start of type {tensor.dtype}")
            for name, (factor, momentum) in decay.items():
                if not math.isfinite(factor) or not (momentum is None or math.isfinite(momentum)):
                    raise ValueError(f"{name}: damaged AP state, a decay of {factor} and {momentum}")
        except (LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"damaged AP state: {type(error).__name__} {error}") from error
        return start, last_zero, decay

    def warn_if_nothing_can_die(self) -> None:
        """Warns, once, when every activation module of the model is of a kind that cannot die."""
        if self._warned:
            return
        self._warned = True
        kinds = {type(m).__name__: dead_range(m) for m in self.model.modules() if is_activation(m)}
        if kinds and all(interval is None for interval in kinds.values()):
            warn(
                f"no neuron of this model can die ({', '.join(kinds)} cannot): AP removes weights all the same, but it "
                "wakes nothing"
            )

    def _follow(self, kept: Mapping[nn.Parameter, Kept]) -> None:
        """Layers were made smaller: where their weights started goes along."""
        for name in self._start:
            part = kept.get(self.masks.weight(name))
            if part is not None:
                self._start[name] = part.of(self._start[name])
                if name in self._last_zero:
                    self._last_zero[name] = part.of(self._last_zero[name])

    def _count(self, count: int | None) -> int:
        alive = self.masks.alive
        return round(self.rate * alive) if count is None else check_count(count, alive)

    def _choose(
        self, function: Criterion, names: list[str], k: int, leave_out: Mapping[str, Tensor] | None = None
    ) -> Selection:
        if not self._start:
            raise RuntimeError("AP does not know where training started: call mark_start() before it, or use cycle()")
        statistics = self._statistics(names) if criteria.measures(function) else {}

        def layer(name: str, *pieces: Tensor) -> Layer:
            weight, start = pieces or self._weight_and_start(name)
            decay = self._decay.factor(self.masks.weight(name))
            return Layer(name, weight, start, decay, self.seed, statistics.get(name))

        scores: LazyScores
        if isinstance(function, BySign) and function.elementwise:
            scores = Elementwise(
                names, self._weight_and_start, lambda name, *pieces: function.scores(layer(name, *pieces))
            )
        elif isinstance(function, BySign):
            scores = LazyScores(names, lambda name: function.scores(layer(name)))
        else:
            scores = LazyScores(names, lambda name: function(layer(name)))
        candidates = {}
        for name in names:
            if isinstance(function, BySign):
                may = function.candidates(self.masks.weight(name))
            else:
                may = scores[name] != torch.inf
            may.logical_and_(self.masks[name])
            if leave_out is not None:
                may.logical_and_(~leave_out[name])
            candidates[name] = may
        available = sum(count_true(mask) for mask in candidates.values())
        return Selection(lowest(scores, candidates, min(k, available), reuse=True))

    def _weight_and_start(self, name: str) -> tuple[Tensor, Tensor]:
        weight = self.masks.weight(name).detach()
        return weight, self._start[name].to(weight.device)

    def _statistics(self, names: list[str]) -> dict[str, criteria.LayerStatistics]:
        from ap.graph import layer_contexts

        if self.batches is None:
            raise ValueError("this criterion measures its inputs: give AP(..., batches=...)")
        contexts = layer_contexts(self.model, self.example_input)
        layers = {}
        for name in names:
            module = self.masks.module(name)
            if not isinstance(module, (_ConvNd, nn.Linear)) or getattr(module, "transposed", False):
                raise ValueError(
                    f"{name}: inputs are measured for convolutions and linear layers only; limit AP by where="
                )
            layers[name] = module
        activations = {
            name: context.activation if (context := contexts.get(name.rpartition(".")[0])) else None for name in names
        }
        return layer_statistics(self.model, layers, activations, self.batches)

    def _resolve(self, where: str | Iterable[str]) -> list[str]:
        names = self.masks.names
        if where == "all":
            return names
        if where == "rectified":
            from ap.graph import layer_contexts

            contexts = layer_contexts(self.model, self.example_input)
            chosen = [
                name
                for name in names
                if (context := contexts.get(name.rpartition(".")[0])) is not None
                and context.input_rectified
                and context.feeds_rectifier
            ]
            if not chosen:
                raise ValueError(
                    "where='rectified': no layer of this model has a rectified input and feeds a rectifier; "
                    "ap.explain(model) shows what each has"
                )
            return chosen
        patterns = [where] if isinstance(where, str) else list(where or ())
        if not patterns:
            raise ValueError(f"where={where!r} names no layer: 'all', 'rectified', or names and globs")
        matched: set[str] = set()
        for pattern in patterns:
            hits = {
                n
                for n in names
                if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n[: -len(".weight")], pattern)
            }
            if not hits:
                known = ["all", "rectified", *names]
                raise ValueError(f"where={pattern!r} matches no layer{close_names(pattern, known)}")
            matched |= hits
        return [name for name in names if name in matched]


def split(alive: int, amount: float, rate: float) -> tuple[int, int]:
    """(round(p·A), round(q·A)): what a cycle removes altogether, and AP's part of it.

    Raises:
        ValueError: amount or rate outside (0, 1), or a rate at or above the amount.

    >>> split(1000, 0.2, 0.02)
    (200, 20)
    """
    total, own = check_share(amount, "amount", alive), check_share(rate, "rate", alive)
    if rate >= amount:
        raise ValueError(f"rate ({rate}) must be below amount ({amount}): the pruner removes what is left of it")
    if not alive:
        raise ValueError("no weight is alive: there is nothing left to prune")
    return total, own


def _check_pruner(removed: int, share: int, whole: int) -> None:
    """Warns of the two slips after which a run is no comparison any more."""
    if not removed and share:
        warn("the pruner removed nothing in this cycle: it has to zero or mask weights of AP's model inside the block")
    elif removed == whole > share:
        warn(
            "the pruner removed the whole amount of this cycle, and AP's part comes on top: give it the share that "
            "cycle() yields, not the amount"
        )


def _register(plugin: AP) -> Handle:
    """Follows every optimizer step on the plugin's weights, for what the start of training alone cannot tell."""
    reference = weakref.ref(plugin)

    @torch.no_grad()
    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        owner = reference()
        if owner is None:
            return
        held = parameter_ids(optimizer) if owner._last_zero else ()
        for name, zero in owner._last_zero.items():
            weight = owner.masks.weight(name)
            if id(weight) in held:  # else a CUDA graph of another model's step would keep writing here
                zero.logical_and_(weight == 0)
        if owner.criterion is criteria.decay_corrected and _steps(optimizer, owner.masks):
            owner._decay.step(optimizer)

    return after_every_step(after_step, owner=plugin)


def _steps(optimizer: Optimizer, masks: Masks) -> bool:
    held = parameter_ids(optimizer)
    return any(id(masks.weight(name)) in held for name in masks)
