"""Following a model's forward passes: which activation is called where, and for how many inputs its units were dead.

Activation modules are seen by hooks, functional calls by a torch function mode that is active during observed passes
only. What runs inside of a forward pass does nothing but tensor operations and a little bookkeeping that torch.compile
can trace; everything else happens in `begin` and `end`, outside of any graph.  [ours]
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ap.activations.ranges import (
    FUNCTIONAL,
    DeadRange,
    call_dead_range,
    dead_range,
    gradient_dead_range,
    is_activation,
    unread,
)
from ap.dnr_count import count_nonzero_over_batch, count_over_batch, dead_mask
from ap.warn import warn

# Their output is 0 exactly where they are dead: counting what is not 0 there costs less than comparing the input.
_ZERO_WHERE_DEAD = (nn.ReLU, nn.ReLU6)
_ZERO_WHERE_DEAD_CALLS = ("relu", "relu6")

# In eval mode these may take a fused path, which they leave as soon as they carry a hook or a mode is active.
_FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
_OWN_CODE = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # torch.nn's, and call activations as functions


class Seen(NamedTuple):
    """One call of an activation in an observed pass.

    Attributes:
        hits: integers in the unit's shape, for how many inputs a unit was alive (dead with `counted_dead`); None if it
            cannot die.
        gradient_hits: for how many it got no gradient, where that differs; else None.
        can_die: whether a unit can, where that is a matter of parameters on a device, unread; else None: as `hits` say.
    """

    name: str
    kind: str
    batch: int
    shape: torch.Size
    device: torch.device
    hits: Tensor | None
    counted_dead: bool
    gradient_hits: Tensor | None
    can_die: Tensor | None = None


class _Scope:
    """Whose code is running: the module that functional calls are named after."""

    def __init__(self, name: str, batch_axis: int = 0, module_kind: str | None = None, silent: bool = False) -> None:
        self.name = name
        self.batch_axis = batch_axis
        self.module_kind = module_kind  # the functional call is that module's own, and has its name and class
        self.silent = silent  # inside of an activation that has its own hook


class _Site:
    """An activation module with its hooks."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.module = module
        self.kind = type(module).__name__
        self.scope = _Scope(name, silent=True)
        self.zero_where_dead = type(module) in _ZERO_WHERE_DEAD
        self.changes = next(module.parameters(), None) is not None
        self.interval: DeadRange | None = None
        self.gradient_interval: DeadRange | None = None

    def refresh(self, eps: float | None) -> None:
        """Looks the dead range up again: learnable parameters move it. Reads nothing back from a device, where it can.

        On a device the range stays in the same tensors, since a captured graph reads these.
        """
        device = next((parameter.device for parameter in self.module.parameters()), torch.device("cpu"))
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return  # as it was looked up before
        with _unread_on(device), torch.inference_mode(False), torch.no_grad():
            interval, gradient = dead_range(self.module, eps), None
            if hasattr(self.module, "gradient_dead_range"):
                gradient = gradient_dead_range(self.module, eps)
                gradient = None if _surely_same(gradient, interval) else gradient
            if self.changes:  # as tensors: a compiled graph would be made anew for every value of a number
                interval, gradient = _as_tensors(interval, device), _as_tensors(gradient, device)
            if device.type != "cpu":
                interval, gradient = _written(self.interval, interval), _written(self.gradient_interval, gradient)
            self.interval, self.gradient_interval = interval, gradient


def _surely_same(first: DeadRange | None, second: DeadRange | None) -> bool:
    if first is None or second is None:
        return first is second
    ends = zip(first, second, strict=True)
    return all(a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b) for a, b in ends)


def _as_tensors(interval: DeadRange | None, device: torch.device) -> DeadRange | None:
    if interval is None:
        return None
    low, high = (end if isinstance(end, Tensor) else torch.full((), end, device=device) for end in interval)
    return DeadRange(low, high)


def _written(held: DeadRange | None, new: DeadRange | None) -> DeadRange | None:
    """The new ends, in the tensors of the ones held where they fit."""
    if held is None or new is None:
        return new
    for old, end in zip(held, new, strict=True):
        assert isinstance(old, Tensor)
        assert isinstance(end, Tensor)
        if old.shape != end.shape or old.device != end.device:
            return new
        old.copy_(end)
    return held


def _unread_on(device: torch.device) -> AbstractContextManager[None]:
    return nullcontext() if device.type == "cpu" else unread()


def _can_die(interval: DeadRange) -> Tensor | None:
    """Whether any value lies between ends on a device, unread; None where it is known that some do."""
    low, high = interval
    return (low <= high).any() if isinstance(low, Tensor) and low.device.type != "cpu" else None


def _inert(*args: Any) -> None:
    """What a hook becomes in a copied or unpickled model: nothing."""


def _inert_hook() -> Callable[..., None]:
    return _inert


class Hook:
    """A hook that stays with its own model: in copies of that it does nothing."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _inert_hook, ()


class _FunctionalCalls(TorchFunctionMode):
    """Sees the activations that are called as functions."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in FUNCTIONAL:
            return func(*args, **kwargs)
        return self._watch.on_call(func, args, kwargs)


class Watch:
    """The hooks on one model's inside.

    Args:
        names: its modules and their names.
        eps: see `ap.activations.ranges.dead_range`.
    """

    def __init__(self, names: dict[nn.Module, str], eps: float | None) -> None:
        self._eps = eps
        self._ranges = _ranges_of_calls(eps)
        self._tanh_gelu = dead_range(nn.GELU("tanh"), eps)
        self._active = False
        self._scopes: list[_Scope] = []
        self._calls: dict[str, int] = {}
        self._seen: list[Seen] = []
        self._mode = _FunctionalCalls(self)
        self._root = _Scope("")
        self._entries: list[tuple[dict[int, Any], int, Any]] = []
        self._fused = {module: _scope_of(module, name) for module, name in names.items() if isinstance(module, _FUSED)}
        for module, name in names.items():
            if not name and module in self._fused:  # its forward is chosen before a hook could replace it
                warn(
                    f"the model is itself an nn.{type(module).__name__}, whose fused evaluation path is off while a "
                    "monitor is attached (outputs equal to rounding, padding not zeroed); "
                    "to keep it, monitor a module that contains it"
                )
        bare = {part for module in self._fused for part in module.modules()}
        self._sites: list[_Site] = []
        for module, name in outermost_activations(names).items():
            if not (module in bare and type(module) in (nn.ReLU, nn.GELU)):  # any other rules the fused path out
                self._watch_activation(_Site(name, module))
        for module, name in names.items():
            if name and has_own_code(module) and not isinstance(module, _FUSED):
                self._watch_scope(module, _scope_of(module, name))

    def _watch_activation(self, site: _Site) -> None:
        site.refresh(self._eps)
        self._sites.append(site)
        before, after = Hook(partial(self._before, site)), Hook(partial(self._after, site))
        self._keep(site.module.register_forward_pre_hook(before, with_kwargs=True), site.module)
        self._keep(site.module.register_forward_hook(after), site.module)

    def _watch_scope(self, module: nn.Module, scope: _Scope) -> None:
        self._keep(module.register_forward_pre_hook(Hook(partial(self._enter, scope))), module)
        self._keep(module.register_forward_hook(Hook(self._leave)), module)

    def _keep(self, handle: RemovableHandle, module: nn.Module) -> None:
        """Takes a hook off again and notes where it was: it is put on for observed passes only."""
        for hooks in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks):
            if handle.id in hooks:
                self._entries.append((hooks, handle.id, hooks[handle.id]))
        handle.remove()

    # --- outside of any graph ----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Starts observing a pass."""
        self._scopes[:] = [self._root]
        self._calls.clear()
        self._seen.clear()
        self.refresh()
        for module, scope in self._fused.items():
            if not (module.training and isinstance(module, nn.MultiheadAttention)):
                module.__dict__["forward"] = partial(self._run_fused, module, scope)
        for hooks, key, value in self._entries:
            hooks[key] = value
        self._active = True
        self._mode.__enter__()

    def refresh(self) -> None:
        """Looks up again what learnable parameters have moved."""
        for site in self._sites:
            if site.changes:
                site.refresh(self._eps)

    def end(self) -> list[Seen]:
        """Stops observing; what was seen, in order."""
        self._active = False
        for hooks, key, _ in self._entries:
            hooks.pop(key, None)
        for module in self._fused:
            module.__dict__.pop("forward", None)
        _take_off_stack(self._mode)
        seen, self._seen = self._seen, []
        return [call for call in seen if not (call.device.type == "meta" or isinstance(call.hits, FakeTensor))]

    def _run_fused(self, module: nn.Module, scope: _Scope, *args: Any, **kwargs: Any) -> Any:
        """Runs a module as it would run unobserved, so that its output is the same to the bit, and counts beside it."""
        forward = type(module).forward
        if module.training or torch.compiler.is_compiling() or not self._active or _is_hooked(module):
            self._scopes.append(scope)
            output = forward(module, *args, **kwargs)
            self._scopes.pop()
            return output
        self._active = False
        inner = {part: part.__dict__.pop("forward") for part in self._fused if "forward" in part.__dict__}
        try:
            with torch._C.DisableTorchFunction():
                output = forward(module, *args, **kwargs)
        finally:
            self._active = True
        if not isinstance(module, nn.MultiheadAttention):
            if any(isinstance(value, Tensor) and value.is_nested for value in (*args, *kwargs.values())):
                raise ValueError(f"{scope.name}: nested tensors cannot be counted; give padded ones")
            before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            for part, part_scope in self._fused.items():
                if isinstance(part, nn.TransformerEncoderLayer):
                    part.__dict__["forward"] = partial(self._run_scoped, part, part_scope)
            try:
                with torch.no_grad():
                    self._run_scoped(module, scope, *args, **kwargs)
            finally:
                torch.backends.mha.set_fastpath_enabled(before)
                for part in self._fused:
                    part.__dict__.pop("forward", None)
        for part, replaced in inner.items():
            part.__dict__["forward"] = replaced
        return output

    def _run_scoped(self, module: nn.Module, scope: _Scope, *args: Any, **kwargs: Any) -> Any:
        self._scopes.append(scope)
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            self._scopes.pop()

    # --- inside of the forward pass, and of compiled graphs ----------------------------------------------------------

    def _enter(self, scope: _Scope, module: nn.Module, args: Any) -> None:
        if self._active:
            self._scopes.append(scope)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._active:
            self._scopes.pop()

    def _before(self, site: _Site, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._active:
            if not site.zero_where_dead:  # before an in-place activation overwrites it
                value = args[0] if args else next(iter(kwargs.values()))
                self._count(site.scope.name, site.kind, value, site.interval, site.gradient_interval, self._axis())
            self._scopes.append(site.scope)

    def _after(self, site: _Site, module: nn.Module, args: Any, output: Any) -> None:
        if self._active:
            self._scopes.pop()
            if site.zero_where_dead:
                self._count_output(site.scope.name, site.kind, output, self._axis())

    def _axis(self) -> int:
        return self._scopes[-1].batch_axis

    def on_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls a functional activation and counts it."""
        scope = self._scopes[-1]
        if scope.silent or not self._active:
            return func(*args, **kwargs)
        short = FUNCTIONAL[func]
        name = scope.name if scope.module_kind else f"{scope.name}/{short}"
        kind = scope.module_kind or short
        if short in _ZERO_WHERE_DEAD_CALLS:
            output = func(*args, **kwargs)
            self._count_output(name, kind, output, scope.batch_axis)
            return output
        value = args[0] if args else kwargs["input"]
        if len(args) < 2 and all(key in ("input", "inplace") for key in kwargs):
            interval = self._ranges[func]
        elif kwargs.get("approximate") == "tanh":
            interval = self._tanh_gelu
        else:
            with _unread_on(value.device):
                interval = call_dead_range(func, args, kwargs, self._eps)
        self._count(name, kind, value, interval, None, scope.batch_axis)
        return func(*args, **kwargs)

    def _name(self, base: str) -> str:
        call = self._calls.get(base, 0) + 1
        self._calls[base] = call
        return base if call == 1 else f"{base}:{call}"

    def _count_output(self, base: str, kind: str, output: Tensor, batch_axis: int) -> None:
        if torch.compiler.is_compiling():
            self._add_output(base, kind, output, batch_axis)
        else:
            with torch._C.DisableTorchFunction():  # the mode need not see the counting itself
                self._add_output(base, kind, output, batch_axis)

    def _add_output(self, base: str, kind: str, output: Tensor, batch_axis: int) -> None:
        output = _batch_first(_unwrapped(output.detach()), batch_axis)
        count = count_nonzero_over_batch(output)
        shape = output.shape
        self._seen.append(Seen(self._name(base), kind, shape[0], shape[1:], output.device, count, False, None))

    def _count(self, *call: Any) -> None:
        if torch.compiler.is_compiling():
            self._add(*call)
        else:
            with torch._C.DisableTorchFunction():
                self._add(*call)

    def _add(
        self,
        base: str,
        kind: str,
        value: Tensor,
        interval: DeadRange | None,
        gradient_interval: DeadRange | None,
        batch_axis: int,
    ) -> None:
        value = _batch_first(_unwrapped(value.detach()), batch_axis)
        axis = 1 if value.dim() > 1 else 0
        count = gradient_count = can_die = None
        if interval is not None:
            count, can_die = count_over_batch(dead_mask(value, interval, axis)), _can_die(interval)
        if gradient_interval is not None:
            gradient_count = count_over_batch(dead_mask(value, gradient_interval, axis))
        shape, counts = value.shape, (count, True, gradient_count, can_die)
        self._seen.append(Seen(self._name(base), kind, shape[0], shape[1:], value.device, *counts))


def _take_off_stack(mode: TorchFunctionMode) -> None:
    """Ends a mode, which need not be the last one begun: other monitors' may lie above it."""
    above: list[TorchFunctionMode] = []
    for _ in range(torch.overrides._get_current_function_mode_stack().count(mode)):
        while (top := torch.overrides._pop_mode()) is not mode:
            above.append(top)
    for other in reversed(above):
        torch.overrides._push_mode(other)


def _unwrapped(value: Tensor) -> Tensor:
    """A plain tensor: of a transform of torch.func, what it wraps; what vmap maps over is part of the batch."""
    if torch.compiler.is_compiling():
        return value
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            axis = functorch.maybe_get_bdim(value)
            value = functorch.get_unwrapped(value).movedim(axis, 0)
            value = value.flatten(0, 1) if value.dim() > 1 else value
        else:
            value = functorch.get_unwrapped(value)
    return value


def _batch_first(value: Tensor, axis: int) -> Tensor:
    if value.dim() == 0:
        return value[None]
    return value.transpose(0, axis) if axis and value.dim() > 2 else value


def _scope_of(module: nn.Module, name: str) -> _Scope:
    if not isinstance(module, _OWN_CODE):
        return _Scope(name)
    axis = 0 if module.self_attn.batch_first else 1
    activation = module.activation
    if isinstance(module, nn.TransformerEncoderLayer) and type(activation) in (nn.ReLU, nn.GELU):
        return _Scope(f"{name}.activation" if name else "activation", axis, type(activation).__name__)
    return _Scope(name, axis)


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody else's hooks keep a layer from its fused path anyway."""
    hooks = (h for part in module.modules() for h in (*part._forward_hooks.values(), *part._forward_pre_hooks.values()))
    return any(not isinstance(hook, Hook) for hook in hooks)


@lru_cache(maxsize=16)
def _ranges_of_calls(eps: float | None) -> dict[Callable[..., Any], DeadRange | None]:
    """The dead ranges of functional activations with their default arguments: a compiled graph needs them ready."""
    return {func: call_dead_range(func, (), {}, eps) for func in FUNCTIONAL}


def has_own_code(module: nn.Module) -> bool:
    """Whether a module's forward may call an activation as a function."""
    return isinstance(module, _OWN_CODE) or not (
        type(module).__module__.startswith("torch.nn.modules") or is_activation(module)
    )


def outermost_activations(names: dict[nn.Module, str]) -> dict[nn.Module, str]:
    """Activation modules; those inside of another activation are part of it."""
    inner = {part for module in names if is_activation(module) for part in module.modules() if part is not module}
    return {module: name for module, name in names.items() if is_activation(module) and module not in inner}
