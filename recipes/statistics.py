"""Paired comparisons over seeds: intervals, equivalence, the smallest difference that could have been seen."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special  # and not scipy.stats, which takes a second to import

POWER = 0.8
LEVEL = 0.05


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95 % confidence interval (Student's t); the interval is None for a single seed."""

    n: int
    mean: float
    half_width: float | None


@dataclass(frozen=True)
class Paired:
    """An arm against its baseline, seed by seed.

    Attributes:
        n: pairs.
        difference: mean of arm − baseline.
        half_width: of its 95 % confidence interval; None for one pair.
        p: two-sided, paired t-test.
        p_holm: the same after Holm's correction over the table; set by `holm`.
        equivalent: whether two one-sided tests place the difference within ± margin (level 5 %).
        detectable: the smallest true difference that these pairs would have shown with 80 % power.
    """

    n: int
    difference: float
    half_width: float | None
    p: float | None
    p_holm: float | None
    equivalent: bool | None
    detectable: float | None


def mean_of(values: Sequence[float]) -> Mean:
    """The mean and its interval.

    >>> mean_of([1.0, 2.0, 3.0]).mean
    2.0
    """
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Mean(len(x), float(x.mean()), None)
    half = _critical(len(x)) * x.std(ddof=1) / math.sqrt(len(x))
    return Mean(len(x), float(x.mean()), float(half))


def paired(arm: Sequence[float], baseline: Sequence[float], margin: float) -> Paired:
    """Compares values of the same seeds.

    Args:
        arm, baseline: [n] values, position by position of the same seed.
        margin: of the equivalence test, in the values' unit.

    >>> round(paired([1.0, 2.0, 3.5], [1.0, 1.5, 3.0], margin=5.0).difference, 3)
    0.333
    """
    d = np.asarray(arm, dtype=float) - np.asarray(baseline, dtype=float)
    n, difference = len(d), float(d.mean())
    if n < 2:
        return Paired(n, difference, None, None, None, None, None)
    error = float(d.std(ddof=1)) / math.sqrt(n)
    half = _critical(n) * error
    if error == 0 and difference == 0:  # the arms are the same
        return Paired(n, 0.0, 0.0, 1.0, None, True, 0.0)
    if error < 1e-12:
        # The same difference in every pair: accuracies come in steps of one image, so that a few seeds may agree by
        # chance. Their spread says nothing then, and no test is made.
        return Paired(n, difference, None, None, None, None, None)
    p = float(2 * special.stdtr(n - 1, -abs(difference) / error))
    worse = max(special.stdtr(n - 1, (sign * difference - margin) / error) for sign in (-1, 1))
    return Paired(n, difference, half, p, None, bool(worse < LEVEL), detectable(n) * error * math.sqrt(n))


@functools.cache
def detectable(n: int) -> float:
    """The smallest true difference, in standard deviations of the pairs, that n pairs show with 80 % power at 5 %.

    >>> round(detectable(3), 1), round(detectable(10), 2)
    (3.3, 1.0)
    """
    critical = _critical(n)
    # The noncentral t is a normal divided by a chi: quadrature over the chi's quantiles is stable far out.
    quantiles = (np.arange(4000) + 0.5) / 4000
    spread = np.sqrt(special.gammaincinv((n - 1) / 2, quantiles) * 2 / (n - 1))

    def lack(effect: float) -> float:
        shift = effect * math.sqrt(n)
        seen = special.ndtr(shift - critical * spread) + special.ndtr(-critical * spread - shift)
        return float(seen.mean()) - POWER

    return float(optimize.brentq(lack, 0.0, 100.0))


def _critical(n: int) -> float:
    """What Student's t of n values exceeds in one of twenty cases, on either side."""
    return float(special.stdtrit(n - 1, 1 - LEVEL / 2))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction over a table (Holm 1979); None stays None.

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        corrected[i] = highest
    return corrected
