"""Synaptic Stripping: remove the connections that hold a dead unit down (Whitaker & Whitley 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ap.masks import Masks
from pruners.apoz import dead_rates
from pruners.base import Batches, LossFn, Pruner, register


@register("synaptic-stripping")
class SynapticStripping(Pruner):
    """The most negative weights into dead units first, then all other weights by magnitude.

    Our reading of the paper's public description (arXiv 2302.05818), which removes problematic connections of dead
    neurons during training: call it every few epochs, for instance by `Gradual`. A unit is a channel; it is dead when
    it is so for every input and position measured. Counts are exact, so where dead units have fewer negative weights
    than should go, the smallest weights of the model make up for it.

    Args:
        threshold: the dead rate from which on a unit counts as dead, in (0, 1].
        example_input: for models whose graph cannot be traced without.
    """

    needs_data = True
    needs_loss = False

    def __init__(self, threshold: float = 1.0, example_input: Any = None) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is a dead rate in (0, 1], not {threshold}")
        self.threshold = threshold
        self.example_input = example_input

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """w where it is negative and feeds a dead unit, |w| elsewhere."""
        rates = dead_rates(model, self.require_batches(batches), self.example_input)
        scores = {}
        for name in masks:
            weight = masks.weight(name).detach()
            path, _, attribute = name.rpartition(".")
            rate = rates.get(path) if attribute == "weight" else None
            scores[name] = weight.abs()
            if rate is not None:
                dead = (rate >= self.threshold).to(weight.device).view(-1, *(1,) * (weight.dim() - 1))
                scores[name] = torch.where(dead & (weight < 0), weight, scores[name])
        return scores
