"""Activations by name: a dictionary from name to class."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ap.activations import ranges
from ap.activations.gated import GCU, Swish
from ap.activations.ranges import DeadRange
from ap.activations.rectifiers import HeLU, PReLU, SquaredReLU, StarReLU
from ap.activations.smooth import RESCU, GSmeLU, SmeLU

Constructor = Callable[..., nn.Module]

_ACTIVATIONS: dict[str, Constructor] = {spec.name: kind for kind, spec in ranges.MODULES.items()} | {
    "threshold": lambda threshold=0.0, value=0.0: nn.Threshold(threshold, value),  # so that it needs no arguments
    "prelu": PReLU,
    "smelu": SmeLU,
    "gsmelu": GSmeLU,
    "rescu": RESCU,
    "helu": HeLU,
    "swish": Swish,
    "gcu": GCU,
    "relu_squared": SquaredReLU,
    "star_relu": StarReLU,
}


def names() -> list[str]:
    """Every registered name, sorted.

    >>> "smelu" in names() and "relu" in names()
    True
    """
    return sorted(_ACTIVATIONS)


def constructor(name: str) -> Constructor:
    """The class registered under a name.

    Raises:
        ValueError: no such name; close ones are listed.
    """
    try:
        return _ACTIVATIONS[name]
    except KeyError:
        close = difflib.get_close_matches(str(name).lower(), names(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"known names: {', '.join(names())}"
        raise ValueError(f"no activation is named {name!r}; {hint}") from None


def create(name: str, /, **parameters: Any) -> nn.Module:
    """A new activation module; every name can be created without parameters.

    Raises:
        ValueError: unknown name, or a parameter that this activation does not take or accept.

    >>> create("leaky_relu", negative_slope=0.2)
    LeakyReLU(negative_slope=0.2)
    """
    kind = constructor(name)
    try:
        inspect.signature(kind).bind(**parameters)
    except TypeError as error:
        takes = ", ".join(inspect.signature(kind).parameters) or "nothing"
        raise ValueError(f"activation {name!r}: {error}; it takes: {takes}") from None
    return kind(**parameters)


def register(name: str, kind: Constructor, *, dead_range: Any = ..., replace: bool = False) -> None:
    """Makes a class of your own available by name, and known as an activation to the monitor, to `swap` and to `init`.

    Args:
        kind: an nn.Module class, or a function that makes one, callable without arguments.
        dead_range: (low, high), None if it cannot die, or a function (module, eps) → either; not needed when the class
            has a `dead_range` of its own.
        replace: allow a name that is already taken.

    Raises:
        ValueError: the name is taken, or nothing tells the dead range.

    >>> class Step(nn.Module):
    ...     def forward(self, x): return (x > 0).to(x.dtype)
    >>> register("step", Step, dead_range=(float("-inf"), 0.0))
    >>> ranges.dead_range(create("step")), unregister("step")
    (DeadRange(low=-inf, high=0.0), None)
    """
    if name in _ACTIVATIONS and not replace:
        raise ValueError(f"activation {name!r} is registered already; pass replace=True to replace it")
    if not callable(kind):
        raise ValueError(f"activation {name!r}: expected an nn.Module class or a function that makes one, got {kind!r}")
    if dead_range is not ...:
        if not isinstance(kind, type):
            raise ValueError(f"activation {name!r}: dead_range goes with a class; give the made module a `dead_range`")
        ranges.REGISTERED[kind] = dead_range if callable(dead_range) else _constant(dead_range)
    elif isinstance(kind, type) and not hasattr(kind, "dead_range") and not _builtin(kind):
        raise ValueError(f"activation {name!r}: pass dead_range=(low, high), or None if {kind.__name__} cannot die")
    _ACTIVATIONS[name] = kind


def unregister(name: str) -> None:
    """Forgets a registered name."""
    kind = constructor(name)
    del _ACTIVATIONS[name]
    if isinstance(kind, type):
        ranges.REGISTERED.pop(kind, None)


def _builtin(kind: type) -> bool:
    return any(base in ranges.MODULES for base in kind.__mro__)


def _constant(value: Any) -> Callable[[nn.Module, float | None], DeadRange | None]:
    if value is None:
        return lambda module, eps: None
    low, high = value
    interval = DeadRange(float(low), float(high))
    return lambda module, eps: interval
