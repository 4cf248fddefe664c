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
    # What a common factor gives each layer, within its limits, grows with the factor: bisection finds the right one.
    low, high = 0.0, max(1.0, *(alive[name] / max(1, weights[name]) for name in masks))
    for _ in range(100):
        middle = (low + high) / 2
        given = sum(_within(weights[name] * middle, floors[name], alive[name]) for name in masks)
        low, high = (middle, high) if given <= keep else (low, middle)
    exact = {name: _within(weights[name] * low, floors[name], alive[name]) for name in masks}
    shares = {name: int(value) for name, value in exact.items()}
    rest = keep - sum(shares.values())
    for name in sorted(masks, key=lambda name: shares[name] - exact[name]):  # the largest remainders first
        if rest and shares[name] < alive[name]:
            shares[name] += 1
            rest -= 1
    return shares


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def remove_lowest(masks: Masks, scores: Mapping[str, Tensor], count: int, density: str, scope: str) -> int:
    """Removes exactly `count` weights with the lowest scores: by `scope`, or so that `density` holds in each layer."""
    if density == "scope":
        return masks.prune(scores, count=count, scope=cast(Scope, scope))
    alive = masks.layer_alive()
    stay = kept(masks, density, sum(alive.values()) - count)
    return masks.remove(
        {name: lowest({name: scores[name]}, {name: masks[name]}, alive[name] - stay[name])[name] for name in masks}
    )
