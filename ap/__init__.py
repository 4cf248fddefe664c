"""Activate-while-Pruning: measure the neurons that a pruned network leaves dead, and wake them while pruning."""

from ap.cycles import Cycles, prune_iteratively
from ap.masks import Masks
from ap.plugin import AP

__all__ = ["AP", "Cycles", "Masks", "prune_iteratively"]
__version__ = "0.1.0"
