"""Replacing the activations of a model."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ap.activations.ranges import MODULES, is_activation
from ap.activations.registry import create
from ap.names import close_names, named_modules
from ap.warn import warn

Filter = str | Iterable[str] | Callable[[str, nn.Module], bool]
_GATES = (nn.Sigmoid, nn.Hardsigmoid)
_GATE_NAMES = re.compile(r"gate|scale_activation")
_GATE_OWNERS = re.compile(r"squeeze|excit|gate|attention|attn|^se|lstm|gru", re.IGNORECASE)
_TRANSFORMERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class Swapped(int):
    """How many activation modules were replaced: an int that can also undo it.

    Attributes:
        skipped: what was left as it is, by name, and why. Functional calls (`layer1.0/relu`) are among them, since
            there is no module to replace.
    """

    skipped: dict[str, str]
    _undo: list[tuple[nn.Module, str, Any, bool]]

    def undo(self) -> None:
        """Puts the old activations back; a second call does nothing."""
        for owner, key, old, was_module in reversed(self._undo):
            if was_module:
                owner._modules[key] = old
            else:
                owner._modules.pop(key, None)
                for name, value in old.items():
                    setattr(owner, name, value)
        self._undo.clear()


def swap(
    model: nn.Module,
    name: str,
    include: Filter | None = None,
    exclude: Filter | None = None,
    **parameters: Any,
) -> Swapped:
    """Replaces the activation modules of a model, in place.

    A module used in several places is replaced by one module used in those places. Gates (the sigmoid of
    squeeze-and-excitation), softmax and attention stay as they are; what is called as a function cannot be replaced
    and is reported with the remedy. Dropout that works in place no longer does, since it would overwrite outputs that
    the new activations keep for their backward pass (MobileNetV3's does).

    Args:
        model: any module; its parameters are not touched, and those of the new activations are on the same device.
        name: a name of `names()`.
        include: which to replace: module names, globs, or a predicate (name, module); default all but gates. A gate
            that is named here is replaced too.
        exclude: the same, for what to leave.
        parameters: of the new activation.

    Returns:
        The number of modules replaced, with a warning where that is 0; it also has `.undo()` and `.skipped`.

    Raises:
        ValueError: an unknown name or parameter, or a filter that matches no activation.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
        >>> swapped = swap(model, "helu", alpha=0.1)
        >>> swapped, model[1]
        (2, HeLU(alpha=0.1))
        >>> swapped.undo(); model[1]
        ReLU()
    """
    create(name, **parameters)  # a bad name or parameter raises before anything is changed
    places = _places(model)
    chosen = _chosen(places, include, exclude)
    result_skipped: dict[str, str] = {}
    undo: list[tuple[nn.Module, str, Any, bool]] = []
    made: dict[int, nn.Module] = {}
    devices = {parameter.device for parameter in model.parameters()}
    device = devices.pop() if len(devices) == 1 else None
    for path, (owner, key, old) in places.items():
        if path not in chosen:
            if include is None and _is_gate(owner, key, old):
                result_skipped[path] = f"a gate of {type(owner).__name__}"
            else:
                result_skipped[path] = "left out by the filters"
            continue
        new = made.setdefault(id(old), create(name, **parameters).to(device).train(old.training))
        undo.append((owner, key, old, True))
        owner._modules[key] = new
    replaced = len(made)
    for path, module in named_modules(model):
        if isinstance(module, _TRANSFORMERS) and not isinstance(module.activation, nn.Module):
            where = f"{path}.activation" if path else "activation"
            if include is None and (exclude is None or where not in _matching({where: module}, exclude)):
                old_state = {
                    k: module.__dict__[k] for k in ("activation", "activation_relu_or_gelu") if k in module.__dict__
                }
                undo.append((module, "activation", old_state, False))
                del module.__dict__["activation"]
                module._modules["activation"] = create(name, **parameters).to(device).train(module.training)
                if "activation_relu_or_gelu" in old_state:
                    module.activation_relu_or_gelu = 0  # the fused kernel of evaluation knows these two only
                replaced += 1
    if replaced:
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.inplace:
                undo.append((module, "inplace", {"inplace": True}, False))
                module.inplace = False
    result_skipped |= _functional_calls(model)
    if not replaced:
        reasons = [f"{path}: {why}" if path else why for path, why in result_skipped.items()]
        warn(f"swap() replaced nothing; {'; '.join(reasons) or 'this model has no activation module'}")
    result = Swapped(replaced)
    result.skipped, result._undo = result_skipped, undo
    return result


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Module]]:
    """Every place that holds an activation module: its path, the owner and the key there. Inner parts do not count."""
    found: dict[str, tuple[nn.Module, str, nn.Module]] = {}
    inside: set[int] = set()
    for path, module in named_modules(model):
        if id(module) in inside or is_activation(module):
            inside |= {id(part) for part in module.modules()}
            continue
        for key, child in module._modules.items():
            if child is not None and is_activation(child):
                found[f"{path}.{key}" if path else key] = (module, key, child)
    if is_activation(model):
        raise ValueError(f"the model itself is an activation ({type(model).__name__}): create the new one instead")
    return found


def _is_gate(owner: nn.Module, key: str, module: nn.Module) -> bool:
    kind = next((k for k in MODULES if type(module) is k), type(module))
    named = bool(_GATE_NAMES.search(key) or _GATE_OWNERS.search(type(owner).__name__))
    return named and (issubclass(kind, _GATES) or "igmoid" in kind.__name__)


def _chosen(
    places: dict[str, tuple[nn.Module, str, nn.Module]], include: Filter | None, exclude: Filter | None
) -> set[str]:
    modules = {path: module for path, (_, _, module) in places.items()}
    if include is None:
        names = {path for path, place in places.items() if not _is_gate(*place)}
    else:
        names = _matching(modules, include, "include")
    return names - _matching(modules, exclude, "exclude") if exclude is not None else names


def _matching(modules: dict[str, nn.Module], wanted: Filter, what: str | None = None) -> set[str]:
    if callable(wanted):
        return {path for path, module in modules.items() if wanted(path, module)}
    matched: set[str] = set()
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        hits = {path for path in modules if fnmatch.fnmatchcase(path, pattern)}
        if not hits and what is not None:
            raise ValueError(f"{what}={pattern!r} matches no activation{close_names(pattern, modules)}")
        matched |= hits
    return matched


def _functional_calls(model: nn.Module) -> dict[str, str]:
    """Activations that the model calls as functions, where its graph can be traced."""
    from ap.graph import trace

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = trace(model)
    except Exception as error:  # a model's own code may raise anything when it is traced
        why = str(error).partition("\n")[0] or type(error).__name__
        return {"": f"functional calls are not known: {why}"}
    remedy = "is called as a function: make it a module, self.act = nn.ReLU() and self.act(x), to swap it"
    return {node.name: f"{node.op} {remedy}" for node in graph.activations() if node.module is None}
