"""Where a network goes back to after pruning: its initialisation, an early step, only its learning rate, nowhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ap.names import named_modules


@dataclass(frozen=True)
class Rewind:
    """Where to rewind to.

    Attributes:
        kind: "init" (lottery tickets; Frankle & Carbin 2019), "step" (Frankle et al. 2020), "lr" (only the
            learning-rate schedule restarts; Renda et al. 2020) or "none" (fine-tuning).
        step: the optimizer step to rewind to; 0 unless kind is "step".

    Example:
        >>> Rewind.parse("500it")
        Rewind(kind='step', step=500)
        >>> Rewind.parse("2ep", steps_per_epoch=391)
        Rewind(kind='step', step=782)
    """

    kind: Literal["init", "step", "lr", "none"]
    step: int = 0

    @classmethod
    def parse(cls, text: str | Rewind, steps_per_epoch: int | None = None) -> Rewind:
        """From "init", "500it", "2ep", "lr" or "none".

        Raises:
            ValueError: any other text, or epochs without `steps_per_epoch`.
        """
        if isinstance(text, Rewind):
            return text
        if text in ("init", "lr", "none"):
            return cls(text)  # type: ignore[arg-type]
        match = re.fullmatch(r"(\d{1,12})(it|ep)", str(text))
        if match is None:
            raise ValueError(f'rewind must be "init", "lr", "none", or a step such as "500it" or "2ep", not {text!r}')
        number = int(match[1])
        if match[2] == "ep" and number:
            if not steps_per_epoch:
                raise ValueError(f"rewind={text!r} counts epochs: say how many steps one has (steps_per_epoch=…)")
            number *= steps_per_epoch
        return cls("step", number) if number else cls("init")

    @property
    def restores(self) -> bool:
        """Whether weights go back at all."""
        return self.kind in ("init", "step")


class Snapshot:
    """A copy of a model's parameters and buffers, to go back to.

    torch.nn.utils.prune's masks are left out: a rewind must not revive what was pruned.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> snapshot = Snapshot(layer)
        >>> _ = nn.init.constant_(layer.weight, 7.0)
        >>> snapshot.restore(layer); bool((layer.weight == 7).any())
        False
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Copies everything back, in place.

        Raises:
            ValueError: the model has other tensors than the one the snapshot was taken of.
        """
        self.check(model)
        for name, tensor in _tensors(model).items():
            tensor.copy_(self.tensors[name])

    def check(self, model: nn.Module) -> None:
        """Raises ValueError where the model has other tensors than the one the snapshot was taken of."""
        now = _tensors(model)
        odd = sorted(set(now) ^ set(self.tensors)) or [n for n, t in now.items() if t.shape != self.tensors[n].shape]
        if odd:
            raise ValueError(f"the snapshot is of another model: {', '.join(odd[:5])}")

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(self.tensors)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Snapshot:
        """A snapshot with these tensors."""
        snapshot = cls.__new__(cls)
        snapshot.tensors = dict(state)
        return snapshot


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, non-persistent ones too, under the names that they have without torch.nn.utils.prune."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in named_modules(model):
        pruned = {key.removesuffix("_mask") for key in module._buffers if key.endswith("_mask")}
        pruned = {key for key in pruned if module._parameters.get(f"{key}_orig") is not None}
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or id(tensor) in seen or (key.endswith("_mask") and key.removesuffix("_mask") in pruned):
                continue
            seen.add(id(tensor))
            plain = key.removesuffix("_orig") if key.removesuffix("_orig") in pruned else key
            tensors[f"{prefix}.{plain}" if prefix else plain] = tensor
    return tensors
