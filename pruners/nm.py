"""N:M sparsity: of every M neighbours along the input axis, N stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ap.masks import Masks
from ap.ranking import lowest_per_row
from ap.warn import warn
from pruners.base import Batches, LossFn, Pruner, check_owner, checked, register


@register("nm")
class NM(Pruner):
    """|w|, the N largest of every M along the input axis stay (2:4 by default).

    Layers whose input axis is no multiple of M stay whole, and a warning names them. Linear layers pruned 2:4 can be
    given to `torch.sparse.to_sparse_semi_structured`.

    Args:
        n: how many stay, 1 … m − 1.
        m: the size of a group, at least 2.
    """

    scope = "group"
    takes = ()

    def __init__(self, n: int = 2, m: int = 4) -> None:
        if not 0 < n < m:
            raise ValueError(f"N:M needs 0 < n < m, not n={n}, m={m}")
        self.n, self.m = n, m

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """|w|."""
        return {name: masks.weight(name).detach().abs() for name in masks}

    def prune(
        self,
        model: nn.Module,
        masks: Masks,
        amount: float | None = None,
        batches: Batches | None = None,
        loss_fn: LossFn | None = None,
    ) -> int:
        """Removes all but the n largest weights of every m, and returns how many went.

        Args:
            amount: 1 − n/m, which is also the default: nothing else is possible.

        Raises:
            ValueError: another amount, another model's masks, or no layer whose input axis is a multiple of m.
        """
        check_owner(model, masks)
        share = 1 - self.n / self.m
        # A loop that counts weights asks for round(share × alive) / alive.
        if amount is not None and not abs(amount - share) <= min(1e-3, 0.5 / max(1, masks.alive) + 1e-12):
            raise ValueError(f"{self.n}:{self.m} sparsity removes exactly {share:g} of its layers, not amount={amount}")
        fits = [name for name in masks if masks[name].dim() > 1 and masks[name].shape[1] % self.m == 0]
        whole = [name for name in masks if name not in fits]
        if not fits:
            raise ValueError(f"no layer has an input axis that is a multiple of {self.m}")
        if whole:
            warn(f"{', '.join(whole)}: the input axis is no multiple of {self.m}, so these stay whole")
        scores = checked(self.scores(model, masks), masks, self.name)
        return masks.remove({name: self._surplus(scores[name], masks[name]) for name in fits})

    def _surplus(self, scores: Tensor, alive: Tensor) -> Tensor:
        """Which of one layer's living weights are beyond n in their group."""
        moved = alive.movedim(1, -1)
        groups = moved.reshape(-1, self.m)
        quotas = (groups.sum(1) - self.n).clamp(min=0)
        chosen = lowest_per_row(scores.movedim(1, -1).reshape(-1, self.m), groups, quotas)
        return chosen.view(moved.shape).movedim(-1, 1).to(torch.bool)
