"""Finding the models that a loop trains: which modules are called, and which of them an optimizer steps."""

from __future__ import annotations

import warnings
import weakref
from contextlib import suppress
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer

# torch.compile's: a hook is called twice for a compiled module. That does no harm here, and the user has set none.
_HOOKED = r"Using `torch\.compile\(module\)` when there are global hooks"


class CalledModules:
    """Notes every module that is called in training mode, between `start()` and `stop()`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> called = CalledModules().start()
        >>> _ = model(torch.ones(1, 2))
        >>> called.stop()
        >>> called.outermost({id(p) for p in model.parameters()}) == [model]
        True
    """

    def __init__(self) -> None:
        self._called: dict[int, weakref.ref[nn.Module]] = {}
        self._handle: Any = None
        self._filter: Any = None

    def start(self) -> Self:
        """Begins to note; returns itself."""
        if self._handle is None:
            self._handle = register_module_forward_pre_hook(self._note)
            warnings.filterwarnings("ignore", _HOOKED, UserWarning)
            self._filter = warnings.filters[0]
        return self

    def stop(self) -> None:
        """Ends it: PyTorch's modules are called as fast as before."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            with suppress(ValueError):  # the script may have set filters of its own
                warnings.filters.remove(self._filter)  # type: ignore[attr-defined]

    def outermost(self, parameters: set[int]) -> list[nn.Module]:
        """The called modules that hold any of these parameters (their ids) and lie in no other called module."""
        modules = [module for ref in self._called.values() if (module := ref()) is not None]
        inner = {id(part) for module in modules for part in module.modules() if part is not module}
        return [m for m in modules if id(m) not in inner and any(id(p) in parameters for p in m.parameters())]

    def _note(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not module.training:
            return
        known = self._called.get(id(module))
        if known is None or known() is not module:  # ids of what is gone are given again
            self._called[id(module)] = weakref.ref(module)


def stepped(optimizer: Optimizer) -> set[int]:
    """The ids of an optimizer's parameters."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
