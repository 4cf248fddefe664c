"""Random pruning: the baseline that every criterion must beat."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ap.masks import Masks
from ap.ranking import LazyScores
from pruners.base import Batches, LossFn, Pruner, register


@register("random")
class Random(Pruner):
    """Uniform scores, which depend on the seed and the layer's name only.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """Uniform in [0, 1)."""

        def draw(name: str) -> Tensor:
            generator = torch.Generator().manual_seed(zlib.crc32(f"pruner:{self.seed}:{name}".encode()))
            return torch.rand(masks[name].shape, generator=generator).to(masks[name].device)

        return LazyScores(masks.names, draw)
