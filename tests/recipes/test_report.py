"""The sentences of a report, from rows written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from recipes.config import Arm, Experiment, Job
from recipes.report import Report


def sentence(arms: str, alive: dict[str, list[int]], seeds: int = 1) -> str:
    """Of runs whose rows have these numbers of weights, and accuracies and rates that depend on arm and cycle only."""
    config = Experiment(ap=tuple(arms.split()), cycles=2, seeds=seeds)
    found: dict[Job, list[dict[str, Any]]] = {}
    for place, (arm, counts) in enumerate(alive.items()):
        for seed in range(seeds):
            found[Job(Arm.parse(arm), seed)] = [
                {
                    "cycle": cycle,
                    "alive": count,
                    "density": count / 100,
                    "accuracy": 0.9 + 0.01 * place * cycle * (1 + seed / 10),
                    "dnr_total": 0.5 - 0.1 * place * cycle,
                }
                for cycle, count in enumerate(counts)
            ]
    return Report(config, found).sentence()


def test_one_density_is_no_range() -> None:
    single = {"none": [100, 80], "lite": [100, 80]}
    assert sentence("none lite", single) == (
        "lite against none: accuracy differs by +1.00 points with a single seed, which shows nothing."
    )
    found = sentence("none lite", single, seeds=3)
    assert "can be missed; the dead-neuron rate changes by -10.0 points, shown to be lower at 0 of 1 density." in found
    assert "median" not in found


def test_several_densities_are_a_range() -> None:
    several = {"none": [100, 80, 64], "lite": [100, 80, 64]}
    assert "accuracy differs by +1.00 to +2.00 points" in sentence("none lite", several)
    found = sentence("none lite", several, seeds=3)
    assert "(the median over densities; " in found
    assert "changes by -20.0 to -10.0 points, shown to be lower at 0 of 2 densities." in found


@pytest.mark.parametrize(
    ("arms", "alive", "why"),
    [
        ("lite", {"lite": [100, 80]}, "that takes an arm and its baseline, none"),
        ("none lite", {"none": [100, 80], "lite": [100]}, "no seed has a pruned network in an arm and in its baseline"),
        ("none lite", {"none": [100, 80], "lite": [100, 79]}, "never have the same number of weights left. Structured"),
    ],
)
def test_why_nothing_is_compared(arms: str, alive: dict[str, list[int]], why: str) -> None:
    assert sentence(arms, alive).startswith("Nothing is compared: ")
    assert why in sentence(arms, alive)
