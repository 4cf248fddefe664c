"""What is to happen after every optimizer's steps: one global hook of PyTorch's for all that this package keeps."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

AfterStep = Callable[[Optimizer, Any, Any], object]

# Replaced and never changed: PyTorch's own dictionary of hooks cannot change while another thread goes through it.
_functions: dict[int, AfterStep] = {}
_numbers = itertools.count()
_lock = threading.RLock()  # a finalizer may remove a function in the middle of adding one
_hooked = False


class StepHandle:
    """What `after_every_step` returns."""

    def __init__(self, number: int, owner: object | None) -> None:
        self._number = number
        self._finalizer = None if owner is None else weakref.finalize(owner, _remove, number)

    def remove(self) -> None:
        """The function is not called any more, from the next step on."""
        _remove(self._number)
        if self._finalizer is not None:
            self._finalizer.detach()  # or the owner would collect one for each handle that it ever had


def _remove(gone: int) -> None:
    global _functions
    with _lock:
        _functions = {number: function for number, function in _functions.items() if number != gone}


def after_every_step(function: AfterStep, owner: object | None = None) -> StepHandle:
    """Calls `function(optimizer, args, kwargs)` after each step of any optimizer, in whatever thread it is made.

    Unlike PyTorch's `register_optimizer_step_post_hook`, functions may come and go while other threads make steps.
    With an `owner` it ends with that object, which must not be held by the function.
    """
    global _functions, _hooked
    with _lock:
        if not _hooked:
            register_optimizer_step_post_hook(_call_all)
            _hooked = True
        handle = StepHandle(next(_numbers), owner)
        _functions = {**_functions, handle._number: function}
    return handle


def _call_all(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for function in _functions.values():
        function(optimizer, args, kwargs)
