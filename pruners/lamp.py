"""LAMP: layer-adaptive magnitude pruning (Lee et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ap.masks import Masks
from ap.ranking import count_true
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
    whole = count_true(alive) == alive.numel()
    flat = weight.reshape(-1)
    living = None if whole else alive.reshape(-1).nonzero()[:, 0]
    magnitudes = (flat if living is None else flat.index_select(0, living)).abs()  # several times as fast as [living]
    order = ascending(magnitudes)
    ordered = magnitudes.index_select(0, order)
    square = ordered.to(exact).square_()
    # Summed from the largest down: a total minus a running sum would lose the largest weights to rounding.
    tail = _running_sums(square.flip(0)).flip(0)
    # Equal magnitudes share the sum at the first of them.
    repeats = (ordered[1:] == ordered[:-1]).nonzero()[:, 0] + 1
    if repeats.numel():
        starts = torch.ones_like(repeats, dtype=torch.bool)
        starts[1:] = repeats[1:] != repeats[:-1] + 1
        tail[repeats] = tail[repeats[starts][starts.cumsum(0) - 1] - 1]
    ranked = square.div_(tail).nan_to_num_(0.0).to(torch.float32)  # 0 / 0 where the whole layer is zero
    if living is None:
        return torch.empty_like(ranked).scatter_(0, order, ranked).view(weight.shape)
    scores = torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)
    return scores.scatter_(0, living.index_select(0, order), ranked).view(weight.shape)


def _running_sums(values: Tensor) -> Tensor:
    """values.cumsum(0), in place where that can be; on CUDA that of floats is refused in deterministic mode."""
    if values.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum_(0).to(values.device)
    return values.cumsum_(0)


def ascending(magnitudes: Tensor) -> Tensor:
    """The order that sorts values ≥ 0.

    >>> ascending(torch.tensor([2.0, 0.5, 1.0])).tolist()
    [1, 2, 0]
    """
    if magnitudes.device.type != "cpu" or magnitudes.dtype != torch.float32:
        return torch.argsort(magnitudes)
    # The bits of floats ≥ 0 are in their order. NumPy sorts 16 bits by radix: the lower half, then, stably, the upper
    # one, which takes a third of the time of a comparison sort.
    bits = magnitudes.numpy().view(np.uint32)
    order = np.argsort(bits.astype(np.uint16), kind="stable")
    upper = (bits >> 16).astype(np.uint16).take(order)
    return torch.from_numpy(order.take(np.argsort(upper, kind="stable")))
