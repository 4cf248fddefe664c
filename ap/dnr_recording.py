"""Counting in passes that are made again without Python: a captured CUDA graph holds the counting, and is replayed.

What an ordinary pass hands over as new tensors is added up here in tensors that stay where they are, by operations that
the graph holds as well.  [ours]
"""

from __future__ import annotations

import torch
from torch import Tensor

from ap.dnr_tally import Tally
from ap.dnr_watch import Seen


class Recording:
    """The counts of one pass, however often it is made.

    For a CUDA graph: make a pass to warm up inside of `with monitor.into(recording)`, `clear()` the recording, capture
    inside of such a block too, and for every replay add 1 to `passes`. Reports then tell of the replays. A graph
    captured inside of `with monitor.into(None)` counts nothing; `monitor.due()` says which of the two to replay.

    Args:
        mode: "train" or "eval": the kind of the passes.

    Attributes:
        passes: how many were made whose counts have not been handed over yet.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.passes = 0
        self._calls: list[Seen] = []

    def add(self, calls: list[Seen]) -> None:
        """Adds what a pass has counted; the first decides where the sums lie, so it must not be the captured one."""
        if not self._calls:
            self._calls = [
                call._replace(
                    hits=_zeros(call.hits),
                    gradient_hits=_zeros(call.gradient_hits),
                    can_die=None if call.can_die is None else torch.zeros_like(call.can_die),
                )
                for call in calls
            ]
        for total, call in zip(self._calls, calls, strict=True):
            if total.can_die is not None and call.can_die is not None:
                total.can_die.logical_or_(call.can_die)
            for sum_, count in ((total.hits, call.hits), (total.gradient_hits, call.gradient_hits)):
                if sum_ is not None and count is not None:
                    sum_.add_(count)

    def clear(self) -> None:
        """Forgets what was counted."""
        self.passes = 0
        for call in self._calls:
            for sum_ in (call.hits, call.gradient_hits, call.can_die):
                if sum_ is not None:
                    sum_.zero_()

    def hand_over(self, tally: Tally) -> None:
        """Adds all of it to a tally, and begins anew."""
        if self.passes:
            tally.add_pass(call._replace(batch=call.batch * self.passes) for call in self._calls)
            tally.passes += self.passes - 1
            self.clear()


def _zeros(count: Tensor | None) -> Tensor | None:
    return None if count is None else torch.zeros_like(count, dtype=torch.int32)
