"""Pruning criteria: one a file, a few lines each. Ranking, counting and ties live in `ap.ranking`."""

from pruners import gradient, grasp, lamp, magnitude, nm, random, taylor  # noqa: F401  (they register themselves)
from pruners.base import Pruner, create, names, register
from pruners.schedules import Gradual

__all__ = ["Gradual", "Pruner", "create", "names", "register"]
