"""Models of one's own: `package.module:factory`."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

import ap.activations


def load_factory(path: str) -> Callable[..., nn.Module]:
    """The callable that `package.module:factory` names; the factory may be an attribute of a class (`Nets.small`).

    Importing the module runs it: only name what you trust. Raises ValueError if there is no such module or factory,
    with the close names.

    >>> load_factory("torchvision.models:resnet18").__name__
    'resnet18'
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise ValueError(f"{path!r} is not of the form package.module:factory")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and one that it needs is not: that is the message to see
        raise ValueError(f"{path!r}: no module {error.name!r}; is its folder on PYTHONPATH?") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, [name for name in dir(found) if not name.startswith("_")], n=3)
            hint = f": did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"{path!r}: {module_name!r} has no {part!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{path!r} is a {type(found).__name__}, not a function or class that makes a model")
    return found


def call_factory(
    path: str,
    factory: Callable[..., nn.Module],
    given: Mapping[str, Any],
    activation: str | None,
    params: Mapping[str, Any],
) -> nn.Module:
    """Calls `factory` with what it names of `given`, and of `activation` and `activation_params`.

    An activation that the factory does not take is swapped into what it returns.
    """
    offered = {**given, "activation": activation, "activation_params": params or None}
    offered = {name: value for name, value in offered.items() if value is not None}
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # some callables written in C do not tell
        parameters = {}.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
    standard = {"num_classes", "in_channels", "image_size", "width", "activation", "activation_params"}
    refused = sorted(set(offered) - named - standard) if not takes_any else []
    if refused:
        raise ValueError(f"{path!r} has no option {', '.join(refused)}; it takes {', '.join(sorted(named)) or 'none'}")
    # What it does not name it did not ask for: a factory with **kwargs hands them on to something that may refuse them.
    model = factory(**{name: value for name, value in offered.items() if name in named or name not in standard})
    if not isinstance(model, nn.Module):
        raise ValueError(f"{path!r} returned a {type(model).__name__}, not a torch.nn.Module")
    if activation is not None and "activation" not in named and not ap.activations.swap(model, activation, **params):
        raise ValueError(f"{path!r} has no activation module to replace by {activation!r}: let it take activation=")
    return model
