"""How layers are named, how unknown names are answered, and which wrappers are refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from torch import nn


def named_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Like `model.named_modules()`, but without the path elements that wrappers add: DDP's and EMA's `module`,
    torch.compile's `_orig_mod`. Each module comes once, under its first name.

    >>> wrapped = nn.Module(); wrapped.module = nn.Sequential(nn.ReLU())
    >>> [name for name, _ in named_modules(wrapped)]
    ['', '0']
    """
    seen: set[int] = set()
    stack = [(prefix, model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        children = [(key, child) for key, child in module._modules.items() if child is not None]
        if _is_wrapper(module):
            stack.append((name, children[0][1]))
            continue
        yield name, module
        stack += [(f"{name}.{key}" if name else key, child) for key, child in reversed(children)]


def _is_wrapper(module: nn.Module) -> bool:
    """One child, called `module` or `_orig_mod`, and no parameter of its own."""
    return (
        len(module._modules) == 1
        and next(iter(module._modules)) in ("module", "_orig_mod")
        and next(iter(module._modules.values())) is not None
        and not any(parameter is not None for parameter in module._parameters.values())
    )


def close_names(name: object, known: Iterable[str]) -> str:
    """The end of an error message: the known names that look like `name`, in whichever case, or nothing.

    >>> close_names("Magnitud", ["magnitude", "random"])
    '; close: magnitude'
    """
    lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(str(name).lower(), list(lower), n=3, cutoff=0.5)
    return f"; close: {', '.join(lower[one] for one in close)}" if close else ""


def unknown(what: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is in no registry, with the close ones and all there are.

    >>> str(unknown("pruner", "lmap", ["lamp", "random"]))
    "unknown pruner 'lmap'; close: lamp (known: lamp, random)"
    """
    names = list(known)
    return ValueError(f"unknown {what} {name!r}{close_names(name, names)} (known: {', '.join(names)})")


def refuse_meta(model: nn.Module) -> None:
    """Raises ValueError for a model without values, of which nothing can be computed."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device, without any values: give it its weights first")


def refuse_wrappers(model: object) -> None:
    """Raises TypeError for what is not a plain module: DataParallel, FSDP, tensor parallelism, or no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"{name} is" if name else "the model is"
        if isinstance(module, nn.DataParallel):
            raise TypeError(f"{where} wrapped in nn.DataParallel: pass its .module, or use DistributedDataParallel")
        kinds = {base.__name__ for base in type(module).__mro__}
        if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
            raise TypeError(f"{where} sharded by FSDP, whose weights are in pieces: prune before wrapping, or use DDP")
        if any(type(parameter).__name__ == "DTensor" for parameter in module._parameters.values()):
            raise TypeError(f"{where} distributed (DTensor), its weights are in pieces: prune before that, or use DDP")
