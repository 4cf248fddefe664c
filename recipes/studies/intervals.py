"""Means, shares and differences with 95 % intervals, as every study reports them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval, and how many values it rests on."""

    mean: float
    low: float
    high: float
    n: int

    def __neg__(self) -> Interval:
        """The interval of the negated values: of b − a where this is that of a − b."""
        return Interval(-self.mean, -self.high, -self.low, self.n)

    def to_dict(self) -> dict[str, Any]:
        """Its fields, for JSON; what is not finite becomes null there."""
        return {k: v if isinstance(v, int) or math.isfinite(v) else None for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Interval:
        """What `to_dict` wrote."""
        mean, low, high = (math.nan if data[k] is None else float(data[k]) for k in ("mean", "low", "high"))
        return cls(mean, low, high, int(data["n"]))

    def text(self, digits: int = 2) -> str:
        """`89.31 [88.90, 89.72]`, or the mean alone where there is no interval."""
        if not math.isfinite(self.mean):
            return "–"
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def mean(values: Sequence[float]) -> Interval:
    """The mean of independent values with Student's t interval.

    >>> mean([1.0, 2.0, 3.0]).text()
    '2.00 [-0.48, 4.48]'
    """
    x = np.asarray(values, dtype=float)
    n = len(x)
    if n < 2:
        return Interval(float(x.mean()) if n else math.nan, math.nan, math.nan, n)
    half = float(stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / math.sqrt(n))
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, n)


def paired(values: Sequence[float], others: Sequence[float]) -> Interval:
    """The mean of `values − others`, pair by pair."""
    if len(values) != len(others):
        raise ValueError(f"pairs need equal lengths, not {len(values)} and {len(others)}")
    return mean([a - b for a, b in zip(values, others, strict=True)])


def share(successes: int, n: int) -> Interval:
    """A share in percent with Wilson's interval.

    >>> share(100, 100).text(1)
    '100.0 [96.3, 100.0]'
    """
    z = 1.959963984540054
    p, centre = successes / n, (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n * p * (1 - p) + z * z / 4)
    return Interval(100 * p, max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half)), n)


def bootstrap(
    n: int | Sequence[int], statistic: Callable[..., float], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of `statistic(index, …)` over resamples of 0 … n − 1, of each axis in `n`."""
    sizes = [n] if isinstance(n, int) else list(n)
    generator = np.random.default_rng(seed)
    values = [statistic(*(generator.integers(0, size, size) for size in sizes)) for _ in range(draws)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
