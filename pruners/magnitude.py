"""Magnitude pruning (Han et al. 2015), over all layers together or layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ap.masks import Masks
from ap.ranking import Elementwise
from pruners.base import Batches, LossFn, Pruner, register


@register("magnitude")
class Magnitude(Pruner):
    """|w|, compared over all layers."""

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """|w|."""
        return Elementwise(masks.names, lambda name: [masks.weight(name)], lambda name, weight: weight.detach().abs())


@register("layer-magnitude")
class LayerMagnitude(Magnitude):
    """|w|, compared within each layer: every layer loses the same share."""

    scope = "layer"
