"""Dead neurons: which units of a model pass nothing and learn nothing, counted exactly while it runs.

For one input a unit is dead when its activation neither passes nor learns there (`ap.activations.ranges`): a ReLU at
z ≤ 0. *Static*: dead for every input seen. *Dynamic*: dead for this input, but not static. Both, and the observation
that the dynamic rate falls while weights are pruned, are from Liu, Ghosh and Motani (2023) [paper]; activations other
than ReLU, units as elements, and everything about how they are counted is this project's [ours].
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from ap.activations.ranges import check_eps, dead_range
from ap.dnr_count import Counts
from ap.dnr_report import DNRReport, LayerDNR, rates_of
from ap.dnr_watch import Hook, Seen, Watch, has_own_code, outermost_activations
from ap.names import named_modules, refuse_wrappers

MODES = ("train", "eval")

_WHY_NOT_COMPILED = (
    "DNRMonitor decides outside of the graph whether a pass is counted; with fullgraph=True, "
    "or where a compiled function calls the model, attach it to the compiled model: DNRMonitor(torch.compile(model))"
)
_uncompiled = torch.compiler.disable
if "reason" in inspect.signature(torch.compiler.disable).parameters:
    _uncompiled = partial(torch.compiler.disable, reason=_WHY_NOT_COMPILED)


class _Layer:
    """What is known of one activation: its counts of being alive and, where it differs, of getting a gradient."""

    def __init__(self, kind: str, can_die: bool) -> None:
        self.kind = kind
        self.can_die = can_die
        self.alive: Counts | None = None
        self.learning: Counts | None = None

    def merged(self, other: _Layer | None) -> _Layer:
        both = _Layer(self.kind, self.can_die or (other is not None and other.can_die))
        for part in ("alive", "learning"):
            mine, theirs = getattr(self, part), getattr(other, part, None)
            counts = mine.clone() if mine is not None else None
            if counts is None:
                counts = theirs.clone() if theirs is not None else None
            elif theirs is not None:
                counts.merge(theirs)
            setattr(both, part, counts)
        return both


class _Window:
    """Counts of one kind of pass, from one reset to the next."""

    def __init__(self) -> None:
        self.passes = 0
        self.layers: dict[str, _Layer] = {}

    def add(self, seen: Seen) -> None:
        layer = self.layers.setdefault(seen.name, _Layer(seen.kind, False))
        if layer.alive is None:
            layer.alive = Counts(seen.shape, seen.device)
        layer.can_die |= seen.hits is not None
        layer.alive.add_batch(seen.shape, seen.hits, seen.batch, seen.counted_dead)
        if seen.gradient_hits is not None:
            if layer.learning is None:
                layer.learning = Counts(seen.shape, seen.device)
            layer.learning.add_batch(seen.shape, seen.gradient_hits, seen.batch, counted_dead=True)

    def merged(self, other: _Window) -> _Window:
        both = _Window()
        both.passes = self.passes + other.passes
        for name in [*self.layers, *(name for name in other.layers if name not in self.layers)]:
            mine, theirs = self.layers.get(name), other.layers.get(name)
            both.layers[name] = mine.merged(theirs) if mine is not None else theirs.merged(None)  # type: ignore[union-attr]
        return both


class DNRMonitor:
    """Watches a model's forward passes and counts, exactly, for how many inputs each unit was dead.

    Use it as a with-block, or `attach()` and `detach()`. It changes nothing: outputs stay bitwise the same, and after
    `detach()` the model is as it was. Activations called as functions (`F.relu`, `x.relu_()`) are seen too.

    Args:
        model: any module with activations; DataParallel and FSDP are refused.
        every: observe the first pass and then every so many; training and evaluation passes are counted apart.
        eps: `|f|` and `|f'|` at most this make a unit dead; None takes each activation's own, 0 or 0.01.

    Raises:
        ValueError: `every` is not a positive integer, or the model has no activation that can die.
        TypeError: the model is wrapped in DataParallel or FSDP, or no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> _ = model[0].weight.data.copy_(torch.eye(2)), model[0].bias.data.zero_()
        >>> with DNRMonitor(model, every=1) as monitor:
        ...     _ = model(torch.tensor([[1.0, -1.0], [-1.0, -1.0]]))
        >>> report = monitor.report()
        >>> report.total, report.static, report.dynamic
        (0.75, 0.5, 0.25)
    """

    def __init__(self, model: nn.Module, every: int = 50, eps: float | None = None) -> None:
        refuse_wrappers(model)
        check_eps(eps)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be a positive number of passes, got {every!r}")
        self.model = model
        self.every = every
        self.eps = eps
        self._past = {mode: _Window() for mode in MODES}  # until the last log()
        self._window = {mode: _Window() for mode in MODES}  # since then
        self._seen = dict.fromkeys(MODES, 0)
        self._handles: list[Any] = []
        self._watch: Watch | None = None
        self._depth = 0
        self._observed: str | None = None  # the kind of the pass under way, if it is observed

    # --- attaching ---------------------------------------------------------------------------------------------------

    def attach(self) -> Self:
        """Starts watching; returns the monitor."""
        if self._watch is None:
            names = {module: name for name, module in named_modules(self.model)}
            _refuse_if_nothing_can_die(names, self.eps)
            self._watch = Watch(names, self.eps)
            self._handles = [
                self.model.register_forward_pre_hook(Hook(self._enter)),
                self.model.register_forward_hook(Hook(self._leave), always_call=True),
            ]
        return self

    def detach(self) -> None:
        """Stops watching and leaves the model as it was; what was counted stays."""
        if self._watch is not None:
            self._abandon()
            self._watch.remove()
            self._watch = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # --- results -----------------------------------------------------------------------------------------------------

    def report(self, mode: str | None = None) -> DNRReport:
        """Rates since the last `reset()`, on this rank.

        Args:
            mode: "train" or "eval" for one kind of pass, None for both together.

        Raises:
            ValueError: unknown mode, no pass of that kind was observed, or nothing in the model can die.
        """
        if mode not in (None, *MODES):
            raise ValueError(f"unknown mode {mode!r}: 'train', 'eval' or None")
        chosen = MODES if mode is None else (mode,)
        windows = [window[kind] for kind in chosen for window in (self._past, self._window)]
        merged = windows[0]
        for window in windows[1:]:
            merged = merged.merged(window)
        return _report(merged, mode)

    def reset(self) -> None:
        """Forgets what was counted; the next pass is observed."""
        for mode in MODES:
            self._past[mode], self._window[mode] = _Window(), _Window()
        self._seen = dict.fromkeys(MODES, 0)

    # --- watching ----------------------------------------------------------------------------------------------------

    @_uncompiled
    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._depth and not _is_nested(self.model):  # the last pass was interrupted, by Ctrl-C for example
            self._abandon()
        self._depth += 1
        if self._depth > 1 or self._watch is None:
            return
        mode = "train" if self.model.training else "eval"
        if self._seen[mode] % self.every == 0:
            self._observed = mode
            self._watch.begin()
        self._seen[mode] += 1

    @_uncompiled
    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0 and self._observed is not None:
            self._finish()

    def _abandon(self) -> None:
        """Forgets the pass under way, if there is one."""
        self._depth = 0
        if self._observed is not None and self._watch is not None:
            self._watch.end()
        self._observed = None

    def _finish(self) -> None:
        assert self._watch is not None
        assert self._observed is not None
        window = self._window[self._observed]
        self._observed = None
        window.passes += 1
        for seen in self._watch.end():
            window.add(seen)


def _is_nested(model: nn.Module) -> bool:
    """Whether the model is being called by its own forward pass."""
    calls, frame = 0, sys._getframe(1)
    while frame is not None and calls < 2:
        calls += frame.f_code is _CALL and frame.f_locals.get("self") is model
        frame = frame.f_back  # type: ignore[assignment]
    return calls == 2


_CALL = nn.Module._call_impl.__code__


def _refuse_if_nothing_can_die(names: dict[nn.Module, str], eps: float | None) -> None:
    """Only where it is certain before a pass: no module has code of its own that may call an activation."""
    activations = outermost_activations(names)
    if any(dead_range(module, eps) is not None for module in activations) or any(map(has_own_code, names)):
        return
    kinds = sorted({type(module).__name__ for module in activations})
    found = f"its activations ({', '.join(kinds)}) cannot" if kinds else "it has no activation"
    raise ValueError(f"nothing in this model can die: {found}")


def _report(window: _Window, mode: str | None) -> DNRReport:
    if window.passes == 0:
        kind = f"{mode} " if mode else ""
        raise ValueError(
            f"no {kind}pass was observed: call the model itself, not its submodules, between attach() and detach()"
        )
    mortal = {name: layer for name, layer in window.layers.items() if layer.can_die and layer.alive is not None}
    if not mortal:
        kinds = sorted({layer.kind for layer in window.layers.values()})
        raise ValueError(
            f"nothing in this model can die: its activations ({', '.join(kinds)}) cannot"
            if kinds
            else "nothing in this model can die: no activation was called in the passes observed"
        )
    alive = [layer.alive for layer in mortal.values() if layer.alive is not None]
    rates = dict(zip(mortal, rates_of(alive), strict=True))
    learning = {name: layer.learning for name, layer in mortal.items() if layer.learning is not None}
    no_gradient = dict(zip(learning, rates_of(learning.values()), strict=True))
    layers = {}
    for name, layer in window.layers.items():
        counts = layer.alive
        assert counts is not None
        total, static = rates.get(name, (None, None))
        gradient_total, gradient_static = no_gradient.get(name, (None, None))
        layers[name] = LayerDNR(
            name=name,
            kind=layer.kind,
            units=counts.alive.numel(),
            samples=counts.samples,
            total=total,
            static=static,
            dynamic=None if total is None or static is None else total - static,
            can_die=layer.can_die,
            gradient_total=gradient_total,
            gradient_static=gradient_static,
            unit=counts.unit,
            counts=counts,
        )
    return DNRReport(layers, mode, window.passes)


@torch.no_grad()
def measure_dnr(model: nn.Module, batches: Iterable[Any], eps: float | None = None) -> DNRReport:
    """Dead-neuron rates over all batches, in eval mode and without gradients; each module's mode is restored.

    Args:
        model: see `DNRMonitor`.
        batches: tensors, or (inputs, targets) pairs; moved to the device of the model's parameters.
        eps: see `DNRMonitor`.

    Raises:
        ValueError: there are no batches, or nothing in the model can die.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> measure_dnr(model, [torch.randn(8, 3), torch.randn(5, 3)]).layers["1"].samples
        13
    """
    monitor = DNRMonitor(model, every=1, eps=eps)
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters(), None)
    try:
        model.eval()
        with monitor:
            for batch in batches:
                inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
                model(inputs.to(parameter.device) if parameter is not None else inputs)
    finally:
        for module, training in modes.items():
            module.training = training
    if not monitor._seen["eval"]:
        raise ValueError("measure_dnr: there are no batches")
    return monitor.report("eval")
