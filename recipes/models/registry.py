"""Models by name, and by `package.module:factory`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

import ap.activations

Activation = Callable[[], nn.Module]
"""Makes one activation module: called once a call site, so that each has its own name in reports."""


@dataclass(frozen=True)
class Request:
    """What a model is built for: the data's classes, channels and size in pixels, the activation, and the width."""

    num_classes: int
    in_channels: int
    image_size: int
    activation: Activation
    width: float = 1.0

    def channels(self, published: int) -> int:
        """The published number of channels or units, times the width."""
        return max(1, round(published * self.width))


Build = Callable[..., nn.Module]


@dataclass(frozen=True)
class Entry:
    build: Build
    activation: str


_entries: dict[str, Entry] = {}


def register(name: str, *, activation: str = "relu") -> Callable[[Build], Build]:
    """Decorates `build(request, **options) -> nn.Module`; `activation` is the one the model was published with."""

    def add(build: Build) -> Build:
        if name in _entries:
            raise ValueError(f"a model {name!r} is registered already")
        _entries[name] = Entry(build, activation)
        return build

    return add


def names() -> list[str]:
    """The models that `create` knows."""
    return sorted(_entries)


def create(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    activation: str | None = None,
    *,
    activation_params: Mapping[str, Any] | None = None,
    width: float = 1.0,
    **options: Any,
) -> nn.Module:
    """The model `name` for images [N, in_channels, image_size, image_size] and `num_classes` classes."""
    if name not in _entries:
        close = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or names()
        raise ValueError(f"unknown model {name!r}: did you mean {', '.join(close)}?")
    entry = _entries[name]
    chosen = activation or entry.activation
    params = dict(activation_params or {})
    request = Request(num_classes, in_channels, image_size, lambda: ap.activations.create(chosen, **params), width)
    return entry.build(request, **options)
