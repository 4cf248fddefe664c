"""Dead neurons: which units of a model pass nothing and learn nothing, counted exactly while it runs.

For one input a unit is dead when its activation neither passes nor learns there (`ap.activations.ranges`): a ReLU at
z ≤ 0. *Static*: dead for every input seen. *Dynamic*: dead for this input, but not static. Both, and the observation
that the dynamic rate falls while weights are pruned, are from Liu, Ghosh and Motani (2023) [paper]; activations other
than ReLU, units as elements, and everything about how they are counted is this project's [ours].
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ap.activations.ranges import (
    FUNCTIONAL,
    DeadRange,
    call_dead_range,
    dead_range,
    gradient_dead_range,
    is_activation,
)
from ap.dnr_count import Counts, count_over_batch, dead_mask
from ap.dnr_report import DNRReport, LayerDNR, rates_of
from ap.names import named_modules, refuse_wrappers

MODES = ("train", "eval")

# Their output is 0 exactly where they are dead: counting what is not 0 there costs less than comparing the input.
_ZERO_WHERE_DEAD = (nn.ReLU, nn.ReLU6)
_ZERO_WHERE_DEAD_CALLS = ("relu", "relu6")


def _inert(*args: Any) -> None:
    """What a monitor's hook becomes in a copied or unpickled model: nothing."""


class _Hook:
    """A hook that stays with its own model: copies of it do nothing."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> str:
        return "_inert"


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

    def merged(self, other: _Window) -> _Window:
        both = _Window()
        both.passes = self.passes + other.passes
        for name in [*self.layers, *(name for name in other.layers if name not in self.layers)]:
            mine, theirs = self.layers.get(name), other.layers.get(name)
            both.layers[name] = mine.merged(theirs) if mine is not None else theirs.merged(None)  # type: ignore[union-attr]
        return both


class _FunctionalCalls(TorchFunctionMode):
    """Active during observed passes: sees the activations that are called as functions."""

    def __init__(self, monitor: DNRMonitor) -> None:
        super().__init__()
        self._monitor = monitor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in FUNCTIONAL:
            return func(*args, **kwargs)
        return self._monitor._on_call(func, args, kwargs, sys._getframe(1))


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
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be a positive number of passes, got {every!r}")
        self.model = model
        self.every = every
        self.eps = eps
        self._past = {mode: _Window() for mode in MODES}  # until the last log()
        self._window = {mode: _Window() for mode in MODES}  # since then
        self._seen = dict.fromkeys(MODES, 0)
        self._handles: list[Any] = []
        self._names: dict[nn.Module, str] = {}
        self._activations: dict[nn.Module, str] = {}
        self._depth = 0
        self._observing = False
        self._calls: Counter[str] = Counter()
        self._functional = _FunctionalCalls(self)

    # --- attaching ---------------------------------------------------------------------------------------------------

    def attach(self) -> Self:
        """Starts watching; returns the monitor."""
        if self._handles:
            return self
        self._names = {module: name for name, module in named_modules(self.model)}
        self._activations = _outermost_activations(self._names)
        _refuse_if_nothing_can_die(self._names, self._activations, self.eps)
        for module in self._activations:
            if type(module) in _ZERO_WHERE_DEAD:
                self._handles.append(module.register_forward_hook(_Hook(self._after_activation)))
            else:
                hook = _Hook(self._before_activation)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        self._handles.append(self.model.register_forward_pre_hook(_Hook(self._enter)))
        self._handles.append(self.model.register_forward_hook(_Hook(self._leave), always_call=True))
        return self

    def detach(self) -> None:
        """Stops watching and leaves the model as it was; what was counted stays."""
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

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        mode = "train" if self.model.training else "eval"
        self._observing = self._seen[mode] % self.every == 0
        self._seen[mode] += 1
        if self._observing:
            self._mode = mode
            self._calls.clear()
            self._window[mode].passes += 1
            self._functional.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and self._observing:
            self._observing = False
            self._functional.__exit__(None, None, None)

    def _after_activation(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._observing:
            layer = self._layer(self._activations[module], type(module).__name__, True)
            self._count(layer, output, None, None)

    def _before_activation(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._observing:
            value = args[0] if args else next(iter(kwargs.values()))
            interval = dead_range(module, self.eps)
            layer = self._layer(self._activations[module], type(module).__name__, interval is not None)
            self._count(layer, value, interval, gradient_dead_range(module, self.eps))

    def _on_call(self, func: Any, args: Any, kwargs: Any, frame: FrameType) -> Any:
        owner = self._owner(frame)
        if owner is None or owner in self._activations:
            return func(*args, **kwargs)
        short = FUNCTIONAL[func]
        name = f"{self._names[owner]}/{short}"
        if short in _ZERO_WHERE_DEAD_CALLS:
            output = func(*args, **kwargs)
            self._count(self._layer(name, short, True), output, None, None)
            return output
        value = args[0] if args else kwargs["input"]
        interval = call_dead_range(func, args, kwargs, self.eps)
        self._count(self._layer(name, short, interval is not None), value, interval, interval)
        return func(*args, **kwargs)

    def _owner(self, frame: FrameType | None) -> nn.Module | None:
        """The innermost module of this model whose code is running."""
        while frame is not None:
            if frame.f_code.co_argcount:
                first = frame.f_locals.get(frame.f_code.co_varnames[0])
                if isinstance(first, nn.Module) and first in self._names:
                    return first
            frame = frame.f_back
        return None

    def _layer(self, base: str, kind: str, can_die: bool) -> _Layer:
        self._calls[base] += 1
        name = base if self._calls[base] == 1 else f"{base}:{self._calls[base]}"
        layers = self._window[self._mode].layers
        if name not in layers:
            layers[name] = _Layer(kind, can_die)
        return layers[name]

    @torch.no_grad()
    def _count(
        self, layer: _Layer, value: Tensor, interval: DeadRange | None, gradient_interval: DeadRange | None
    ) -> None:
        """Counts a batch: what is not 0 of an output where there is no interval, else what of an input lies in it."""
        value = value.detach()
        if value.dim() == 0:
            value = value[None]
        batch = value.shape[0]
        if layer.alive is None:
            layer.alive = Counts(value.shape[1:], value.device)
        if not layer.can_die:
            layer.alive.samples += batch
            return
        if interval is None:
            layer.alive.add_batch(count_over_batch(value.to(torch.bool)), batch)
            return
        axis = 1 if value.dim() > 1 else 0
        layer.alive.add_batch(count_over_batch(dead_mask(value, interval, axis)), batch, counted_dead=True)
        if gradient_interval is not None and not _same(gradient_interval, interval):
            if layer.learning is None:
                layer.learning = Counts(value.shape[1:], value.device)
            layer.learning.add_batch(
                count_over_batch(dead_mask(value, gradient_interval, axis)), batch, counted_dead=True
            )


def _same(first: DeadRange, second: DeadRange) -> bool:
    ends = zip(first, second, strict=True)
    return all(a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b) for a, b in ends)


def _outermost_activations(names: dict[nn.Module, str]) -> dict[nn.Module, str]:
    """Activation modules; those inside of another activation are part of it."""
    inner = {part for module in names if is_activation(module) for part in module.modules() if part is not module}
    return {module: name for module, name in names.items() if is_activation(module) and module not in inner}


def _refuse_if_nothing_can_die(
    names: dict[nn.Module, str], activations: dict[nn.Module, str], eps: float | None
) -> None:
    """Only where it is certain before a pass: no module has code of its own that may call an activation."""
    if any(dead_range(module, eps) is not None for module in activations):
        return
    own_code = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    for module in names:
        is_torchs = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, own_code)
        if module not in activations and not is_torchs:
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
