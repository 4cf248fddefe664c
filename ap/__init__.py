"""Activate-while-Pruning: measure the neurons that a pruned network leaves dead, and wake them while pruning."""

from ap import activations, init
from ap.compaction import compact, compare
from ap.cycles import Cycles, prune_iteratively
from ap.dnr import DNRMonitor, measure_dnr
from ap.explain import explain
from ap.masks import Masks
from ap.plugin import AP

__all__ = [
    "AP",
    "Cycles",
    "DNRMonitor",
    "Masks",
    "activations",
    "compact",
    "compare",
    "explain",
    "init",
    "measure_dnr",
    "prune_iteratively",
]
__version__ = "0.1.0"
