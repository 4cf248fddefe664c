"""Pruning criteria: one a file, a few lines each. Ranking, counting and ties live in `ap.ranking`."""

from pruners import (  # noqa: F401  (they register themselves)
    apoz,
    gradient,
    grasp,
    lamp,
    lookahead,
    magnitude,
    nm,
    random,
    stripping,
    structured_importances,
    synflow,
    taylor,
    wanda,
)
from pruners.base import Pruner, create, names, register
from pruners.compatibility import check_combination, compatibility
from pruners.schedules import Gradual

__all__ = ["Gradual", "Pruner", "check_combination", "compatibility", "create", "names", "register"]
