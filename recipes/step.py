"""One optimizer step: from the numbers that say which images, to weights that are a step further."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

Context = contextlib.AbstractContextManager[Any]


class Step:
    """Makes the steps of one training.

    Args:
        model: what is trained, called as `forward` (the same, compiled or wrapped).
        forward: what is called.
        optimizer: its optimizer.
        batch: makes (images, targets) from a step's inputs, on the device.
        loss_fn: (outputs, targets) to the loss.
        autocast: the precision of the forward pass.
        device: where all of it is.

    Attributes:
        loss_sum: the sum of the losses since somebody zeroed it.
        bad: the first step whose loss was not finite, counted from 0 since the training's begin; −1 if there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor],
        optimizer: Optimizer,
        batch: Callable[..., tuple[Tensor, Any]],
        loss_fn: Callable[[Tensor, Any], Tensor],
        autocast: Callable[[], Context],
        device: torch.device,
    ) -> None:
        self.model, self.optimizer, self.device = model, optimizer, device
        self._forward, self._batch, self._loss_fn, self._autocast = forward, batch, loss_fn, autocast
        self.loss_sum = torch.zeros((), device=device)
        self.bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, inputs: tuple[Tensor, ...], rate: float) -> bool:
        """Makes one step with this learning rate.

        Returns:
            False where the loss is known not to be finite, which a CPU knows at once: the weights are then untouched.
            A GPU is not waited for; ask `bad` now and then.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return self._make(inputs)

    def _make(self, inputs: tuple[Tensor, ...]) -> bool:
        x, targets = self._batch(*inputs)
        with self._autocast():
            outputs = self._forward(x)
        loss = self._loss_fn(outputs.float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        loss = loss.detach()
        if self.device.type == "cpu":
            if not math.isfinite(loss.item()):  # before the step spoils all weights
                return False
        else:
            first = ~torch.isfinite(loss) & (self.bad < 0)
            self.bad.copy_(torch.where(first, self.number, self.bad))
            self.number += 1
        self.optimizer.step()
        self.loss_sum += loss
        return True
