"""Taylor expansion of the loss, squared per batch (Molchanov et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ap.masks import Masks
from ap.ranks import reduce_over_ranks
from pruners.base import Batches, LossFn, Pruner, batch_gradients, register


@register("taylor")
class Taylor(Pruner):
    """The squared first-order change of the loss without the weight, summed over batches."""

    needs_data = True

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """Σ over batches of (w · ∂L/∂w)² (Molchanov et al. 2019, equation 8)."""
        scores = {name: torch.zeros_like(masks.weight(name), dtype=torch.float32) for name in masks}
        for gradients in batch_gradients(model, masks, *self.require_data(batches, loss_fn)):
            for name, gradient in gradients.items():
                scores[name] += (masks.weight(name).detach().float() * gradient.float()).square_()
        reduce_over_ranks(scores.values())
        return scores
