"""Bounds, special points, Lipschitz and smoothness constants of activations, from their formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Smooth = Callable[[Tensor], Tensor]
REACH = 12.0  # beyond it the activations here are within 1e-4 of straight lines, or (gcu) known to be unbounded


@dataclass(frozen=True)
class Pieces:
    """A function by its smooth pieces: breakpoints, and one formula more than there are breakpoints."""

    breaks: tuple[float, ...]
    formulas: tuple[Smooth, ...]
    unbounded_slope: bool = False


def _zero(x: Tensor) -> Tensor:
    return 0 * x


def _one(x: Tensor) -> Tensor:
    return 1.0 * x


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))


SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
FUNCTIONS: dict[str, Pieces] = {
    "gelu": Pieces((), (lambda x: x * _normal_cdf(x),)),
    "gelu (tanh)": Pieces((), (lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),)),
    "silu": Pieces((), (lambda x: x * torch.sigmoid(x),)),
    "swish, β = 2": Pieces((), (lambda x: x * torch.sigmoid(2 * x),)),
    "mish": Pieces((), (lambda x: x * torch.tanh(F.softplus(x)),)),
    "softplus": Pieces((), (lambda x: x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())),)),
    "sigmoid": Pieces((), (torch.sigmoid,)),
    "tanh": Pieces((), (torch.tanh,)),
    "softsign": Pieces((0.0,), (lambda x: x / (1 - x), lambda x: x / (1 + x))),
    "elu": Pieces((0.0,), (torch.expm1, _one)),
    "selu": Pieces((0.0,), (lambda x: SELU_SCALE * SELU_ALPHA * torch.expm1(x), lambda x: SELU_SCALE * x)),
    "relu": Pieces((0.0,), (_zero, _one)),
    "leaky_relu": Pieces((0.0,), (lambda x: 0.01 * x, _one)),
    "relu6": Pieces((0.0, 6.0), (_zero, _one, lambda x: 6 + 0 * x)),
    "hardswish": Pieces((-3.0, 3.0), (_zero, lambda x: x * (x + 3) / 6, _one)),
    "smelu": Pieces((-0.5, 0.5), (_zero, lambda x: (x + 0.5) ** 2 / 2, _one)),
    "rescu": Pieces(
        (-0.5, 0.5), (_zero, lambda x: (x + 0.5) ** 3 - (x + 0.5) ** 4 / 2, _one)
    ),  # smoothstep on [−½, ½]: ∫₀^τ (3t² − 2t³) dt = τ³ − τ⁴/2
    "relu_squared": Pieces((0.0,), (_zero, lambda x: x**2), unbounded_slope=True),
    "gcu": Pieces((), (lambda x: x * torch.cos(x),), unbounded_slope=True),
}


@dataclass(frozen=True)
class Extremum:
    """The largest or smallest value on a grid, and by how much the true one can lie beyond it."""

    value: float
    at: float
    error: float


@dataclass(frozen=True)
class Analysis:
    """What `analyse` finds on [−12, 12]."""

    minimum: Extremum
    slope_low: Extremum
    slope_high: Extremum
    lipschitz: float
    curvature: Extremum | None  # sup |f″|; None where the slope jumps
    stationary: tuple[float, ...]
    inflection: tuple[float, ...]


def derivatives(formula: Smooth, x: Tensor, order: int) -> list[Tensor]:
    """f, f′, …, up to `order`, at x, by automatic differentiation."""
    x = x.clone().requires_grad_()
    found = [formula(x)]
    for _ in range(order):
        if not found[-1].requires_grad:
            found.append(torch.zeros_like(x))
            continue
        (next_one,) = torch.autograd.grad(found[-1].sum(), x, create_graph=True, allow_unused=True)
        found.append(torch.zeros_like(x) if next_one is None else next_one)
    return [value.detach() for value in found]


def analyse(function: Pieces, step: float = 1e-3) -> Analysis:
    """Extremes and special points of a function, with error bounds.

    On each smooth piece the function and its derivatives are evaluated every `step`; between neighbours at a distance
    h a quantity g differs from the larger of the two by at most h²/8 · sup|g″|, where sup|g″| is that of the grid with
    a tenth added. Zeros are bisected to 1e-12.
    """
    edges = [-REACH, *function.breaks, REACH]
    parts: list[tuple[Tensor, list[Tensor]]] = []
    stationary: list[float] = []
    inflection: list[float] = []
    for low, high, formula in zip(edges[:-1], edges[1:], function.formulas, strict=True):
        x = torch.linspace(low, high, max(2, round((high - low) / step)) + 1, dtype=torch.float64)
        values = derivatives(formula, x, 4)
        parts.append((x, values))
        stationary += _zeros(formula, 1, x, values[1])
        inflection += _zeros(formula, 2, x, values[2])

    def extreme(order: int, sign: float) -> Extremum:
        best: Extremum | None = None
        bound = 0.0
        for x, values in parts:
            g = sign * values[order]
            i = int(g.argmax())
            h = float(x[1] - x[0])
            second = values[order + 2].abs().max() if order + 2 < len(values) else torch.tensor(0.0)
            bound = max(bound, 1.1 * float(second) * h * h / 8)
            if best is None or float(g[i]) > sign * best.value:
                best = Extremum(sign * float(g[i]), float(x[i]), 0.0)
        assert best is not None
        return Extremum(best.value, best.at, bound)

    least, most = extreme(1, -1), extreme(1, 1)
    jumps = any(abs(float(a[1][1][-1] - b[1][1][0])) > 1e-9 for a, b in itertools.pairwise(parts))
    curve = max((extreme(2, 1), extreme(2, -1)), key=lambda e: abs(e.value))
    return Analysis(
        minimum=extreme(0, -1),
        slope_low=least,
        slope_high=most,
        lipschitz=math.inf if function.unbounded_slope else max(abs(least.value), abs(most.value)),
        curvature=None if jumps else curve,
        stationary=tuple(sorted(set(stationary))),
        inflection=tuple(sorted(set(inflection))),
    )


def _zeros(formula: Smooth, order: int, x: Tensor, values: Tensor) -> list[float]:
    """Where the derivative of that order changes its sign, bisected."""
    significant = values.abs() > 1e-12  # not the rounding noise of the flat tails
    change = (values[:-1] * values[1:] < 0) & significant[:-1] & significant[1:]
    exact = (values[1:-1] == 0) & (values[:-2] * values[2:] < 0)
    found = [float(x[i + 1]) for i in torch.nonzero(exact).flatten().tolist()]
    for i in torch.nonzero(change).flatten().tolist():
        low, high, sign = float(x[i]), float(x[i + 1]), float(values[i].sign())
        while high - low > 1e-12:
            middle = (low + high) / 2
            if middle in (low, high):
                break
            value = float(derivatives(formula, torch.tensor([middle], dtype=torch.float64), order)[order])
            low, high = (middle, high) if value * sign > 0 else (low, middle)
        found.append(round((low + high) / 2, 10) + 0.0)
    return found
