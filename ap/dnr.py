"""Dead neurons: which units of a model pass nothing and learn nothing, counted exactly while it runs.

For one input a unit is dead when its activation neither passes nor learns there (`ap.activations.ranges`): a ReLU at
z ≤ 0. *Static*: dead for every input seen. *Dynamic*: dead for this input, but not static. Both, and the observation
that the dynamic rate falls while weights are pruned, are from Liu, Ghosh and Motani (2023) [paper]; activations other
than ReLU, units as elements, and everything about how they are counted is this project's [ours].
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn

from ap.activations.ranges import check_eps, dead_range
from ap.dnr_recording import Recording
from ap.dnr_report import DNRReport
from ap.dnr_tally import Tally
from ap.dnr_watch import Hook, Watch, has_own_code, outermost_activations
from ap.names import named_modules, refuse_meta, refuse_wrappers
from ap.tensorboard import LogEntry, write_report
from ap.warn import warn

MODES = ("train", "eval")

_WHY_NOT_COMPILED = (
    "DNRMonitor decides outside of the graph whether a pass is counted; with fullgraph=True, "
    "or where a compiled function calls the model, attach it to the compiled model: DNRMonitor(torch.compile(model))"
)


@cache
def _uncompiled(function: Callable[..., None]) -> Callable[..., None]:
    """The function, never compiled. Made at first use: `torch.compiler` loads the compiler, which takes a second."""
    gives_reason = "reason" in inspect.signature(torch.compiler.disable).parameters  # not before torch 2.7
    return torch.compiler.disable(function, **({"reason": _WHY_NOT_COMPILED} if gives_reason else {}))  # type: ignore[no-any-return]


class _RootHook(partial):  # type: ignore[type-arg]
    """A `Hook` that takes no Python call of its own: this one is part of every pass."""

    __deepcopy__ = Hook.__deepcopy__
    __reduce__ = Hook.__reduce__


class _Window:
    """Counts of one kind of pass: summed over ranks until the last sync(), and this rank's own since."""

    def __init__(self) -> None:
        self.shared = Tally()
        self.own = Tally()


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
        self.history: list[LogEntry] = []
        # Until the last log(), and since then; each with what sync() has summed over ranks, and this rank's own since.
        self._past = {mode: _Window() for mode in MODES}
        self._window = {mode: _Window() for mode in MODES}
        self._passes = dict.fromkeys(MODES, 0)
        self._handles: list[Any] = []
        self._watch: Watch | None = None
        self._outside: tuple[Callable[..., None], ...] = ()  # what the hooks call where a graph is being compiled
        # Which threads are in a pass, and how deep. Each changes its own entry only, so that no lock is needed.
        self._inside: dict[int, int] = {}
        self._overlaps = 0  # changes whenever a thread begins a pass in the middle of another's
        self._warned = False
        self._observed: str | None = None  # the kind of the pass under way, if it is observed
        self._observer = (0, 0)  # its thread, and `_overlaps` before it began
        self._recordings: list[Recording] = []
        self._into: Recording | None = None  # where the passes of this moment are counted, if not in the window
        self._paused = False

    # --- attaching ---------------------------------------------------------------------------------------------------

    def attach(self) -> Self:
        """Starts watching; returns the monitor."""
        if self._watch is None:
            names = {module: name for name, module in named_modules(self.model)}
            _refuse_if_nothing_can_die(names, self.eps)
            self._watch = Watch(names, self.eps)
            self._outside = (_uncompiled(DNRMonitor._enter), _uncompiled(DNRMonitor._leave))
            self._handles = [
                self.model.register_forward_pre_hook(_RootHook(DNRMonitor._enter, self)),
                self.model.register_forward_hook(_RootHook(DNRMonitor._leave, self), always_call=True),
            ]
        return self

    def detach(self) -> None:
        """Stops watching and leaves the model as it was; what was counted stays."""
        if self._watch is not None:
            self._abandon()
            self._watch = None
        self._inside.clear()
        self._collect()
        self._recordings.clear()
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
        self._collect()
        total = Tally()
        for kind in MODES if mode is None else (mode,):
            for window in (self._past[kind], self._window[kind]):
                total.merge(window.shared)
                total.merge(window.own)
        return total.report(mode)

    def observed(self) -> tuple[str, ...]:
        """The kinds of pass of which `report(mode)` can tell: "train", "eval", both or none."""
        self._collect()
        windows = {mode: (self._past[mode], self._window[mode]) for mode in MODES}
        return tuple(mode for mode in MODES if any(w.shared.passes or w.own.passes for w in windows[mode]))

    def reset(self) -> None:
        """Forgets what was counted, though not `history`; the next pass is observed."""
        for mode in MODES:
            self._past[mode], self._window[mode] = _Window(), _Window()
        for recording in self._recordings:
            recording.clear()
        self._passes = dict.fromkeys(MODES, 0)

    def sync(self, mode: str | None = None) -> DNRReport:
        """Adds up the counts of all ranks of torch.distributed and returns the report over them; collective.

        Every rank must call it. What was added up counts once, however often it is called: afterwards `report()` and
        `log()` of every rank tell of all ranks up to here, and of their own passes since. Without torch.distributed it
        is `report(mode)`.
        """
        self._collect()
        if dist.is_available() and dist.is_initialized():
            device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
            for windows in (self._past, self._window):
                for window in windows.values():
                    window.shared.merge(window.own.all_reduce(device))
                    window.own = Tally()
        return self.report(mode)

    def log(self, writer: Any, step: int, density: float | None = None) -> None:
        """Writes the rates of the window since the last `log()`, training and evaluation apart, and opens a new one.

        Scalars such as `dnr/train/layer1.0.relu/total` and `dnr/eval/model/dynamic` (see `ap.tensorboard`). A kind of
        pass that was not observed in the window writes nothing.

        Args:
            writer: any object with SummaryWriter's methods.
            step: the training step.
            density: the share of weights that are alive, kept in `history` for pictures against it.

        Raises:
            TypeError: the writer cannot write scalars.
        """
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                "expected a writer with add_scalar(tag, value, step), such as SummaryWriter, got "
                f"{type(writer).__name__}; ap.compat.loggers has others, one of them for loggers with log_metrics"
            )
        self._collect()
        for mode in MODES:
            window, past = self._window[mode], self._past[mode]
            both = Tally()
            both.merge(window.shared)
            both.merge(window.own)
            if both.passes:
                report = both.report(mode)
                write_report(writer, report, step)
                self.history.append(LogEntry.of(report, step, density))
                past.shared.merge(window.shared)
                past.own.merge(window.own)
                self._window[mode] = _Window()

    # --- captured graphs ---------------------------------------------------------------------------------------------

    def record(self) -> Recording:
        """A recording, for `into`: a captured CUDA graph counts in one, see `Recording`.

        Example:
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
            >>> with DNRMonitor(model) as monitor:
            ...     recording = monitor.record()
            ...     with monitor.into(recording):
            ...         _ = model(torch.ones(4, 2))
            ...     recording.passes += 1
            ...     monitor.report().layers["1"].samples
            4
        """
        self._recordings.append(Recording("train" if self.model.training else "eval"))
        return self._recordings[-1]

    @contextmanager
    def into(self, recording: Recording | None) -> Iterator[None]:
        """Every pass inside of the block is counted in the recording, or with None in none; the cadence rests."""
        before = self._into, self._paused
        self._into, self._paused = recording, recording is None
        try:
            yield
        finally:
            self._into, self._paused = before

    def due(self, mode: str = "train") -> bool:
        """Takes note of one pass that is about to be made without Python, and says whether it is one to observe."""
        due = self._is_due(mode)
        if due and self._watch is not None:
            self._watch.refresh()
        return due

    def _is_due(self, mode: str) -> bool:
        self._passes[mode] += 1
        return (self._passes[mode] - 1) % self.every == 0

    def _collect(self) -> None:
        for recording in self._recordings:
            recording.hand_over(self._window[recording.mode].own)

    # --- watching ----------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any, outside: bool = False) -> None:
        if not outside and torch.compiler.is_compiling():
            self._outside[0](self, module, args, True)
            return
        me, before = threading.get_ident(), self._overlaps
        if me not in self._inside:
            self._inside[me] = 1
        elif _is_nested(self.model):
            self._inside[me] += 1
            return
        else:  # the last pass was interrupted, by Ctrl-C for example
            self._inside[me] = 1
            if self._observer[0] == me:
                self._abandon()
        if self._watch is None or self._paused:
            return
        if len(self._inside) > 1 and self._is_beside_others():
            return
        mode = "train" if self.model.training else "eval"
        if self._into is None and not self._is_due(mode):
            return  # nearly always: what comes before costs every pass
        if torch.jit.is_tracing() or _is_exporting():  # the next pass is due instead
            self._passes[mode] -= self._into is None
            return
        self._observed, self._observer = mode, (me, before)
        self._watch.begin()

    def _leave(self, module: nn.Module, args: Any, output: Any, outside: bool = False) -> None:
        if not outside and torch.compiler.is_compiling():
            self._outside[1](self, module, args, output, True)
            return
        me = threading.get_ident()
        depth = self._inside.pop(me, 0) - 1
        if depth > 0:
            self._inside[me] = depth
        elif self._observed is not None and self._observer[0] == me:
            self._finish()

    def _is_beside_others(self) -> bool:
        """Whether another thread is in the middle of a pass, whose counts are then not this model's alone."""
        for thread in set(self._inside) - {thread.ident for thread in threading.enumerate()}:  # ended in a pass
            self._inside.pop(thread, None)
        if len(self._inside) == 1:
            return False
        self._overlaps += 1
        if not self._warned:
            self._warned = True
            warn(
                "several threads pass this model forward at once, and DNRMonitor counts none of the passes that "
                "overlap: give each thread a model of its own, or pass one at a time"
            )
        return True

    def _abandon(self) -> None:
        """Forgets the pass under way, if there is one."""
        if self._observed is not None and self._watch is not None:
            self._watch.end()
        self._observed = None

    def _finish(self) -> None:
        assert self._watch is not None
        assert self._observed is not None
        window = self._window[self._observed]
        self._observed = None
        calls = self._watch.end()
        if self._overlaps != self._observer[1]:
            return
        if self._into is not None:
            self._into.add(calls)
        else:
            window.own.add_pass(calls)


def _is_exporting() -> bool:
    """Whether torch.export is making a graph, which must not hold the counting."""
    return bool(getattr(torch.compiler, "is_exporting", lambda: False)())


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


@torch.no_grad()
def measure_dnr(model: nn.Module, batches: Iterable[Any], eps: float | None = None) -> DNRReport:
    """Dead-neuron rates over all batches, in eval mode and without gradients; each module's mode is restored.

    Args:
        model: see `DNRMonitor`.
        batches: tensors, or (inputs, targets) pairs; moved to the device of the model's parameters. For a model whose
            inputs are something else, run its passes yourself, in evaluation mode, within `DNRMonitor(model, every=1)`.
        eps: see `DNRMonitor`.

    Raises:
        ValueError: there are no batches, the model is on the meta device, or nothing in it can die.
        TypeError: a batch of another kind.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> measure_dnr(model, [torch.randn(8, 3), torch.randn(5, 3)]).layers["1"].samples
        13
    """
    monitor = DNRMonitor(model, every=1, eps=eps)
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters(), None)
    refuse_meta(model)
    try:
        model.eval()
        with monitor:
            for batch in batches:
                inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
                if not hasattr(inputs, "to"):
                    raise TypeError(
                        f"measure_dnr takes batches of tensors, or of (inputs, targets), not {type(inputs).__name__}: "
                        "for others, run the model in evaluation mode within DNRMonitor(model, every=1)"
                    )
                model(inputs.to(parameter.device) if parameter is not None else inputs)
    finally:
        for module, training in modes.items():
            module.training = training
    if not monitor._passes["eval"]:
        raise ValueError("measure_dnr: there are no batches")
    return monitor.report("eval")
