"""Starting from given weights."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.tensors import load_tensors


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dictionary in a safetensors file, or in one that torch saved; neither can run code.

    A checkpoint that holds the weights under "state_dict", "model" or "model_state_dict" is unwrapped, and names are
    rid of the prefixes that DataParallel, DDP and torch.compile add. Raises ValueError for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of weights at {path}")
    found: Any
    try:
        found = load_file(path) if path.suffix == ".safetensors" else load_tensors(path)
    except Exception as error:  # a damaged pickle fails in as many ways as there are bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as weights alone: {reason}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dictionary: a mapping of names to tensors")
    return {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in found.items()}


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads all of the model's weights from `path`, in place.

    A last linear layer for another number of classes keeps its new weights, with a warning; any other difference in
    names or shapes is a ValueError.
    """
    given, own = read_weights(path), model.state_dict()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = {f"{linear[-1]}.weight", f"{linear[-1]}.bias"} if linear else set()
    skipped = {
        name
        for name in head & own.keys() & given.keys()
        if own[name].shape[0] != given[name].shape[0] and own[name].shape[1:] == given[name].shape[1:]
    }
    problems = [
        *(f"{name} is missing" for name in own if name not in given),
        *(f"{name} is not in the model" for name in given if name not in own),
        *(
            f"{name} is {list(given[name].shape)}, the model's is {list(own[name].shape)}"
            for name in own
            if name in given and name not in skipped and own[name].shape != given[name].shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems[:3])}{more}")
    if skipped:
        names = " and ".join(sorted(skipped))
        warnings.warn(f"{path} is for another number of classes: {names} keep their new weights", stacklevel=3)
    model.load_state_dict({name: value for name, value in given.items() if name not in skipped}, strict=False)
