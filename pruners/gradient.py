"""First-order saliency: "global gradient", and SNIP (Lee et al. 2019), which is the same at initialisation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ap.masks import Masks
from pruners.base import Batches, LossFn, Pruner, register, summed_gradients


@register("gradient")
class Gradient(Pruner):
    """|w · ∂L/∂w|, the signed gradient summed over all batches before the absolute value is taken."""

    needs_data = True

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """|w · ∂L/∂w|, in evaluation mode."""
        gradients = summed_gradients(model, masks, *self.require_data(batches, loss_fn))
        return {name: (masks.weight(name).detach() * gradient).abs_() for name, gradient in gradients.items()}


@register("snip")
class SNIP(Gradient):
    """SNIP: connection sensitivity at initialisation, the scores summing to 1. About ten images a class are enough."""

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """|w · ∂L/∂w| / Σ |w · ∂L/∂w|."""
        scores = super().scores(model, masks, batches, loss_fn)
        total = torch.stack([score.sum() for score in scores.values()]).sum()
        return {name: score / total if float(total) else score for name, score in scores.items()}
