"""A running mean of the weights of a training, which often generalises better than the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """The exponential moving average of a model's parameters and floating-point buffers, kept beside it.

    After step n, counted from 1, mean ← d · mean + (1 − d) · weights with d = min(decay, (1 + n) / (10 + n)), so that
    a short training does not end near its beginning. Running statistics of BatchNorm are averaged likewise. A weight
    that was dead when the training began and at every step has a mean of exactly 0: masks hold in the mean too.

    Args:
        model: whose weights; they are the first mean.
        decay: in (0, 1).

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 11.0)
        >>> average = Average(layer, 0.5)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> average.update()  # d = 2/11
        >>> average.adopt(); layer.weight.item()
        2.0
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._sources = {
            name: tensor.detach()
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if tensor.is_floating_point()
        }
        self._means = {name: tensor.clone() for name, tensor in self._sources.items()}
        self._steps = torch.zeros((), device=next(model.parameters()).device)

    @property
    def tensors(self) -> list[Tensor]:
        """All that `update` changes."""
        return [*self._means.values(), self._steps]

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step. Work for the device only: it can be captured in a graph."""
        self._steps += 1
        share = 1 - ((1 + self._steps) / (10 + self._steps)).clamp(max=self.decay)
        means = list(self._means.values())
        changes = torch._foreach_sub(list(self._sources.values()), means)
        torch._foreach_mul_(changes, share)
        torch._foreach_add_(means, changes)

    @torch.no_grad()
    def adopt(self) -> None:
        """The model takes the means over; integer buffers stay as they are."""
        for name, mean in self._means.items():
            self._sources[name].copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        """The means, and of how many steps they are."""
        return {"means": dict(self._means), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        for name, mean in self._means.items():
            mean.copy_(state["means"][name])
        self._steps.copy_(state["steps"])
