"""What is measured on data, over all ranks of torch.distributed together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def reduce_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Sums each tensor over the ranks of torch.distributed, in place, so that every rank prunes the same weights.

    Collective: every rank calls it, with as many tensors. Without torch.distributed it changes nothing.

    >>> reduce_over_ranks([counts := torch.ones(2)])
    >>> counts
    tensor([1., 1.])
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
