"""Pruning criteria: one a file, a few lines each. Ranking, counting and ties live in `ap.ranking`."""

from pruners import gradient, magnitude, random  # noqa: F401  (they register themselves)
from pruners.base import Pruner, create, names, register

__all__ = ["Pruner", "create", "names", "register"]
