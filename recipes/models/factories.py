"""Models of one's own: `package.module:factory`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
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
    *,
    activation: str | None = None,
    activation_params: Mapping[str, Any] | None = None,
    width: float = 1.0,
    options: Mapping[str, Any] | None = None,
    **sizes: int,
) -> nn.Module:
    """Calls the factory that `path` names with those of its arguments that it names, and with all `options`.

    `sizes` are num_classes, in_channels and image_size; a factory that takes `**kwargs` gets num_classes too, since a
    model for another number of classes is of no use. An activation that the factory does not take is swapped into what
    it returns. Raises ValueError for an option that it does not take, and for anything but a module in return.
    """
    factory = load_factory(path)
    parameters = inspect.signature(factory).parameters.values()
    named = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    asked = dict(options or {})
    if width != 1:
        asked["width"] = width
    if activation is not None and "activation" in named:
        asked["activation"] = activation
    if activation_params and (activation is None or "activation" in named):
        asked["activation_params"] = activation_params
    refused = sorted(set(asked) - named)
    if refused and not takes_any:
        raise ValueError(f"{path!r} has no option {', '.join(refused)}; it takes {', '.join(sorted(named)) or 'none'}")
    given = {name: size for name, size in sizes.items() if name in named or (takes_any and name == "num_classes")}
    model = factory(**given, **asked)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{path!r} returned a {type(model).__name__}, not a torch.nn.Module")
    if activation is not None and "activation" not in named:
        with warnings.catch_warnings(action="ignore"):  # what it warns about is an error here
            replaced = ap.activations.swap(model, activation, **(activation_params or {}))
        if not replaced:
            raise ValueError(f"{path!r} has no activation module to replace by {activation!r}: let it take activation=")
    return model
