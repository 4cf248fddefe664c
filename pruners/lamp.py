"""LAMP: layer-adaptive magnitude pruning (Lee et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ap.masks import Masks
from pruners.base import Batches, LossFn, Pruner, register


@register("lamp")
class LAMP(Pruner):
    """w² over the sum of v² of the layer's living weights v at least as large as w, w included; over all layers."""

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """w² / Σ v² over alive v of the same layer with |v| ≥ |w| (Lee et al. 2021, equation 4); 1 for the largest."""
        return {name: lamp(masks.weight(name).detach(), masks[name]) for name in masks}


def lamp(weight: Tensor, alive: Tensor) -> Tensor:
    """LAMP scores of one layer; 0 where it is dead.

    >>> lamp(torch.tensor([3.0, -4.0, 1.0]), torch.tensor([True, True, True])).tolist()
    [0.36000001430511475, 1.0, 0.03846153989434242]
    """
    exact = torch.float32 if weight.device.type == "mps" else torch.float64
    ordered, order = torch.sort(weight[alive].abs())
    square = ordered.to(exact).square_()
    # Summed from the largest down: a total minus a running sum would lose the largest weights to rounding.
    tail = square.flip(0).cumsum_(0).flip(0)
    # Equal magnitudes share the sum at the first of them.
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    tail = tail[first][first.cumsum(0) - 1] if len(ordered) else tail
    ranked = torch.where(tail > 0, square / tail, tail).to(torch.float32)
    scores = torch.zeros_like(weight, dtype=torch.float32)
    scores[alive] = torch.empty_like(ranked).scatter_(0, order, ranked)
    return scores
