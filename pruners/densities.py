"""How the weights that stay are spread over the layers: as the scores say, uniformly, or by ERK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor

from ap.masks import Masks, Scope
from ap.names import unknown
from ap.ranking import lowest

DENSITIES = ("scope", "uniform", "erk")


def check_density(density: str) -> None:
    """ValueError, with the close ones, for a density that is none."""
    if density not in DENSITIES:
        raise unknown("density", density, DENSITIES)


def kept(masks: Masks, density: str, keep: int) -> dict[str, int]:
    """How many weights each layer keeps, `keep` altogether.

    "uniform" gives every layer the same density; "erk" (Mocanu et al. 2018; Evci et al. 2020, section 3) a density in
    proportion to Σ(its axes) / Π(its axes), so that small layers stay denser. A layer that would get more than it has
    alive keeps all of it, and the others share the rest. Never fewer than `masks.floor`, where a layer has as many.

    Raises:
        ValueError: a floor that leaves too few to remove.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 10))
        >>> kept(Masks(model), "uniform", 1100)
        {'0.weight': 1000, '1.weight': 100}
        >>> kept(Masks(model), "erk", 1100)
        {'0.weight': 710, '1.weight': 390}
    """
    alive = masks.layer_alive()
    shapes = {name: masks[name].shape for name in masks}
    weights = {name: sum(shape) if density == "erk" else shape.numel() for name, shape in shapes.items()}
    floors = {name: min(masks.floor, n) for name, n in alive.items()}
    if keep < sum(floors.values()):
        raise ValueError(f"cannot keep just {keep}: the floor of {masks.floor} a layer needs {sum(floors.values())}")
    fixed: dict[str, int] = {}
    while True:
        free = [name for name in masks if name not in fixed]
        rest = keep - sum(fixed.values())
        scale = rest / max(1, sum(weights[name] for name in free))
        full = {name: alive[name] for name in free if weights[name] * scale >= alive[name]}
        low = {name: floors[name] for name in free if weights[name] * scale < floors[name]}
        bound = full or low  # one kind at a time: each changes what the other has to share
        if not bound:
            break
        fixed |= bound
    shares = _split(rest, [weights[name] for name in free], [alive[name] for name in free])
    return {name: fixed.get(name, shares.get(free.index(name), 0) if name in free else 0) for name in masks}


def _split(total: int, weights: list[int], limits: list[int]) -> dict[int, int]:
    """`total` in proportion to `weights` by largest remainder, part i at most limits[i]."""
    if not weights:
        return {}
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: -(total * weights[i] % whole))
    missing = total - sum(shares)
    for i in [*order, *order]:
        if missing and shares[i] < limits[i]:
            shares[i] += 1
            missing -= 1
    return dict(enumerate(shares))


def remove_lowest(masks: Masks, scores: Mapping[str, Tensor], count: int, density: str, scope: str) -> int:
    """Removes exactly `count` weights with the lowest scores: by `scope`, or so that `density` holds in each layer."""
    if density == "scope":
        return masks.prune(scores, count=count, scope=cast(Scope, scope))
    alive = masks.layer_alive()
    stay = kept(masks, density, sum(alive.values()) - count)
    return masks.remove(
        {name: lowest({name: scores[name]}, {name: masks[name]}, alive[name] - stay[name])[name] for name in masks}
    )
