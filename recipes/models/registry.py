"""Models by name, and by `package.module:factory`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

import ap.activations
import ap.init
from ap.names import unknown
from recipes.models.factories import call_factory
from recipes.models.weights import load_weights


@dataclass(frozen=True)
class Request:
    """What a model is built for."""

    num_classes: int
    in_channels: int
    image_size: int
    activation_name: str
    activation_params: Mapping[str, Any]
    width: float = 1.0

    def activation(self) -> nn.Module:
        """A new activation module: one for each call site, so that each has its own name and parameters."""
        return ap.activations.create(self.activation_name, **self.activation_params)

    def channels(self, published: int) -> int:
        """The published number of channels or units, times the width; at least one."""
        return max(1, round(published * self.width))

    def at_least(self, pixels: int, why: str) -> None:
        """Raises ValueError for images smaller than `pixels`, which `why` needs."""
        if self.image_size < pixels:
            raise ValueError(f"image_size must be at least {pixels} for {why}, not {self.image_size}")


Build = Callable[..., nn.Module]


@dataclass(frozen=True)
class Entry:
    """How to build a model, the activation that it was published with, and whether it draws its own weights."""

    build: Build
    activation: str
    initialised: bool = False

    def options(self) -> list[str]:
        """What `build` takes besides the request."""
        _request, *rest = inspect.signature(self.build).parameters.values()
        fixed = getattr(self.build, "keywords", {})
        return [parameter.name for parameter in rest if parameter.name not in fixed]


_entries: dict[str, Entry] = {}


def register(name: str, *, activation: str = "relu", initialised: bool = False) -> Callable[[Build], Build]:
    """Decorates `build(request, **options) -> nn.Module`.

    `activation` is the one used unless another is asked for. Weights are drawn for the activation with
    `ap.init.initialize_` after building, unless the model is `initialised` by its own rules. Raises ValueError for a
    name that is taken.

    >>> from recipes.models import create, names
    >>> @register("perceptron")
    ... def perceptron(request):
    ...     return nn.Sequential(nn.Flatten(), nn.Linear(request.in_channels * request.image_size**2, 10))
    >>> "perceptron" in names(), type(create("perceptron")[1]).__name__
    (True, 'Linear')
    >>> _ = _entries.pop("perceptron")
    """

    def add(build: Build) -> Build:
        if name in _entries:
            raise ValueError(f"a model {name!r} is registered already")
        _entries[name] = Entry(build, activation, initialised)
        return build

    return add


def names() -> list[str]:
    """The models that `create` knows, in alphabetical order.

    >>> "resnet20" in names() and "vgg16-bn" in names()
    True
    """
    return sorted(_entries)


def resolve(name: str) -> str:
    """`torchvision/NAME` as a factory, where NAME is another of torchvision's models than those registered here.

    >>> resolve("torchvision/resnet18"), resolve("torchvision/convnext_tiny")
    ('torchvision/resnet18', 'torchvision.models:convnext_tiny')
    """
    library, _, model = name.partition("/")
    return f"torchvision.models:{model}" if library == "torchvision" and model and name not in _entries else name


def default_activation(name: str) -> str | None:
    """The activation that the model `name` was published with; None for a factory, which chooses its own."""
    return None if ":" in name else _entry(name).activation


def create(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    activation: str | None = None,
    *,
    activation_params: Mapping[str, Any] | None = None,
    width: float = 1.0,
    weights: str | os.PathLike[str] | None = None,
    **options: Any,
) -> nn.Module:
    """The model `name`, from [N, in_channels, image_size, image_size] to logits [N, num_classes].

    `activation` is any name of `ap.activations.names()`, with `activation_params`; without one it is what the model
    was published with (GELU in a vision transformer, ReLU6 in MobileNet-V2, ReLU elsewhere). `width` scales the
    number of channels. New weights are drawn for that activation, from torch's global generator. `weights` is
    a file of weights to start from instead: safetensors, or a state dictionary that torch saved. `options` are the
    model's own, such as `shortcut="B"` for the ResNets. `package.module:factory` calls a factory of one's own with
    those of these arguments that it names; `torchvision/NAME` is any of torchvision's classifiers.

    Raises ValueError for an unknown name, with the close ones, and for what the model cannot be built for.

    >>> model = create("resnet20", activation="relu")
    >>> sum(p.numel() for p in model.parameters())
    269722
    """
    for what, number in (("num_classes", num_classes), ("in_channels", in_channels), ("image_size", image_size)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: {what} must be a whole number of at least 1, not {number!r}")
    if not 0 < width <= 64:
        raise ValueError(f"{name}: width must be above 0 and at most 64, not {width!r}")
    params = dict(activation_params or {})
    name = resolve(name)
    if ":" in name:
        model = call_factory(
            name,
            activation=activation,
            activation_params=params,
            width=width,
            options=options,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
        )
    else:
        entry = _entry(name)
        odd = sorted(set(options) - set(entry.options()))
        if odd:
            known = ", ".join(entry.options()) or "none"
            raise ValueError(f"{name} has no option {', '.join(odd)}; its own options: {known}")
        request = Request(num_classes, in_channels, image_size, activation or entry.activation, params, width)
        request.activation()  # so that a wrong name or parameter is reported as such
        try:
            model = entry.build(request, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if not entry.initialised:
            ap.init.initialize_(model, request.activation_name, **params)
    if weights is not None:
        load_weights(model, weights)
    return model


def _entry(name: str) -> Entry:
    if name not in _entries:
        raise unknown_model(name)
    return _entries[name]


def unknown_model(name: str) -> ValueError:
    """The error for a name that is not registered; torchvision's models are asked for by the bare name, too.

    >>> unknown_model("resnet18")
    ValueError("unknown model 'resnet18': torchvision's is torchvision/resnet18")
    """
    from torchvision.models import list_models  # only here: it takes a second

    if name in list_models():
        return ValueError(f"unknown model {name!r}: torchvision's is torchvision/{name}")
    return unknown("model", name, [*names(), "package.module:factory"])
