"""Smooth rectifiers: SmeLU, its generalisation, and the construction that both are cases of.

Shamir, Lin and Coviello, "Smooth activations and reproducibility in deep networks" (2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ap.activations import lean
from ap.activations.lean import Number
from ap.activations.parameters import Positive, along, free, value_of
from ap.activations.ranges import DeadRange, per_channel, solve
from ap.activations.smooth_rules import (
    FLOOR,
    SMELU,
    SMOOTHSTEP,
    UNIFORM,
    Rise,
    plain_rescu,
    plain_smelu,
    uniform,
    uniform_integral,
)


def smelu(x: Tensor, beta: Number = 0.5) -> Tensor:
    """SmeLU: 0 up to −β, (x + β)²/4β up to β, then x (Shamir et al. 2020, eq. 5).

    Args:
        x: any shape; the result has its dtype.
        beta: half-width β ≥ 0 of the quadratic part, a number or a tensor that broadcasts; below 1e-6 this is ReLU.

    Example:
        >>> smelu(torch.tensor([-1.0, 0.0, 1.0]), 0.5)
        tensor([0.0000, 0.1250, 1.0000])
    """
    if isinstance(beta, Tensor):
        return lean.call(SMELU, x, beta)
    _not_negative("beta", beta)
    if beta < FLOOR:
        return F.relu(x)
    if lean.is_everyday() and x.is_floating_point():
        return Rise.apply(x, float(beta), 2.0 * beta)  # type: ignore[no-any-return]
    return plain_smelu(x, beta)


def rescu(
    x: Tensor,
    alpha: Number = 0.5,
    beta: Number = 0.5,
    g_minus: Number = 0.0,
    g_plus: Number = 1.0,
    t: Number = 0.0,
    cdf: Callable[[Tensor], Tensor] | None = None,
    integral: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """RESCU: slope g₋ up to −α, g₊ from β on, and in between the slope goes along a CDF (Shamir et al. 2020).

    f = t + g₋·(x + α) + (g₊ − g₋)·((α + β)·∫₀^τ F + relu(x − β)) with τ = clamp((x + α)/(α + β), 0, 1).

    Args:
        x: any shape.
        alpha, beta: where the transition begins and ends, ≥ 0 and not both 0.
        g_minus, g_plus: the slopes.
        t: the value at −α.
        cdf, integral: F on [0, 1] and its integral from 0; the smoothstep 3τ² − 2τ³ if not given, which makes f twice
            continuously differentiable. Only the integral enters the value; F is its derivative.

    Example:
        >>> rescu(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.0000, 0.0938, 1.0000])
    """
    if (cdf is None) != (integral is None):
        raise ValueError("rescu takes cdf and integral together: the integral of the CDF from 0")
    _check_widths(alpha, beta)
    if integral is None:
        return lean.call(SMOOTHSTEP, x, alpha, beta, g_minus, g_plus, t)
    return plain_rescu(x, alpha, beta, g_minus, g_plus, t, integral=integral)  # which may have parameters of its own


def gsmelu(
    x: Tensor,
    alpha: Number = 0.5,
    beta: Number = 0.5,
    g_minus: Number = 0.0,
    g_plus: Number = 1.0,
    t: Number = 0.0,
) -> Tensor:
    """Generalised SmeLU: slopes g₋ and g₊ joined by a parabola on [−α, β] (Shamir et al. 2020): RESCU, uniform.

    Example:
        >>> gsmelu(torch.tensor([-1.0, 0.0, 1.0])).tolist() == smelu(torch.tensor([-1.0, 0.0, 1.0])).tolist()
        True
    """
    _check_widths(alpha, beta)
    numbers = (alpha, beta, g_minus, g_plus, t)
    rises = not any(isinstance(p, Tensor) for p in numbers) and numbers[2:] == (0, 1, 0) and alpha + beta >= FLOOR
    if rises and x.is_floating_point() and lean.is_everyday():
        return Rise.apply(x, float(alpha), float(alpha + beta))  # type: ignore[no-any-return]
    return lean.call(UNIFORM, x, *numbers)


def _check_widths(alpha: Number, beta: Number) -> None:
    for name, width in (("alpha", alpha), ("beta", beta)):
        if not isinstance(width, Tensor):
            _not_negative(name, width)


def _not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be 0 or more and finite, not {value}")


def _check_transition(cdf: Callable[[Tensor], Tensor], integral: Callable[[Tensor], Tensor]) -> None:
    tau = torch.linspace(0, 1, 1001, dtype=torch.float64)
    f = cdf(tau)
    if abs(float(f[0])) > 1e-6 or abs(float(f[-1]) - 1) > 1e-6 or float(f.diff().min()) < -1e-9:
        raise ValueError("cdf must go from 0 at 0 to 1 at 1 and never fall")
    area = torch.cat([f.new_zeros(1), torch.cumulative_trapezoid(f, tau)])
    worst = float((integral(tau) - area).abs().max())
    if not worst < 1e-3:  # the trapezoids' own error is below 1e-5 for smooth ones
        raise ValueError(f"integral is not that of cdf from 0: they differ by {worst:.2g} on [0, 1]")


class SmeLU(nn.Module):
    """SmeLU as a module, with a fixed or a learnable β.

    Args:
        beta: half-width β ≥ 0; must be positive where it is learnable.
        learnable: learn β, kept positive by softplus.
        num_parameters: 1 for a shared β, or the number of channels.
        channel_dim: the axis of the channels.

    Example:
        >>> SmeLU(beta=1.0)(torch.zeros(2))
        tensor([0.2500, 0.2500])
    """

    def __init__(
        self, beta: float = 0.5, learnable: bool = False, num_parameters: int = 1, channel_dim: int = 1
    ) -> None:
        super().__init__()
        _not_negative("beta", beta)
        self.channel_dim = channel_dim
        self.beta: Any = Positive(beta, num_parameters, "beta") if learnable else float(beta)

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return smelu(x, along(self.beta, x, self.channel_dim))

    @property
    def dead_range(self) -> DeadRange | None:
        """(−∞, −β]."""
        return self.dead_range_at(None)

    def dead_range_at(self, eps: float | None) -> DeadRange | None:
        """The same where value and slope are at most eps: t ≤ min(eps, √(eps/β)) and x = 2βt − β."""
        beta = value_of(self.beta)
        limit = eps or 0.0
        if isinstance(beta, Tensor):
            t = torch.minimum(torch.full_like(beta, limit), (limit / beta).sqrt())
            return per_channel(torch.full_like(beta, -math.inf), 2 * beta * t - beta, torch.ones_like(beta) > 0)
        share = min(limit, math.sqrt(limit / beta)) if beta else 0.0
        return DeadRange(-math.inf, 2 * beta * share - beta)

    def extra_repr(self) -> str:
        return "" if isinstance(self.beta, nn.Module) else f"beta={self.beta}"


class RESCU(nn.Module):
    """RESCU as a module: pass a transition's CDF and its integral, get an activation.

    Args:
        alpha, beta, g_minus, g_plus, t, cdf, integral: see `rescu`; the smoothstep if no CDF is given.
        learnable: learn all five numbers; α and β are kept positive by softplus.
        num_parameters: 1 for shared ones, or the number of channels.
        channel_dim: the axis of the channels.

    Example:
        >>> f = RESCU(cdf=lambda tau: tau, integral=lambda tau: tau**2 / 2)
        >>> f(torch.tensor([0.0])).item() == smelu(torch.tensor([0.0])).item()
        True
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        g_minus: float = 0.0,
        g_plus: float = 1.0,
        t: float = 0.0,
        cdf: Callable[[Tensor], Tensor] | None = None,
        integral: Callable[[Tensor], Tensor] | None = None,
        learnable: bool = False,
        num_parameters: int = 1,
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        if (cdf is None) != (integral is None):
            raise ValueError("RESCU takes cdf and integral together: the integral of the CDF from 0")
        if cdf is not None and integral is not None:
            _check_transition(cdf, integral)
        _not_negative("alpha", alpha)
        _not_negative("beta", beta)
        self.cdf, self.integral = cdf, integral
        self.channel_dim = channel_dim
        self.alpha: Any = Positive(alpha, num_parameters, "alpha") if learnable else float(alpha)
        self.beta: Any = Positive(beta, num_parameters, "beta") if learnable else float(beta)
        for name, value in (("g_minus", g_minus), ("g_plus", g_plus), ("t", t)):
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, not {value}")
            setattr(self, name, free(value, num_parameters) if learnable else float(value))

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return rescu(x, **self._numbers(x), cdf=self.cdf, integral=self.integral)

    def _numbers(self, x: Tensor) -> dict[str, Number]:
        names = ("alpha", "beta", "g_minus", "g_plus", "t")
        return {name: along(getattr(self, name), x, self.channel_dim) for name in names}

    @property
    def dead_range(self) -> DeadRange | None:
        """(−∞, −α] where g₋ = 0 and t = 0."""
        return self.dead_range_at(None)

    def dead_range_at(self, eps: float | None) -> DeadRange | None:
        """The same with |f| and |f'| at most eps."""
        alpha, g_minus, t = (value_of(getattr(self, name)) for name in ("alpha", "g_minus", "t"))
        if not isinstance(alpha, Tensor):
            if eps:
                return solve(self.forward, eps)
            return DeadRange(-math.inf, -alpha) if g_minus == 0 and t == 0 else None
        if eps:
            return self._channels_dead_range(eps)
        assert isinstance(g_minus, Tensor)
        assert isinstance(t, Tensor)
        return per_channel(torch.full_like(alpha, -math.inf), -alpha, (g_minus == 0) & (t == 0))

    def _channels_dead_range(self, eps: float) -> DeadRange | None:
        names = ("alpha", "beta", "g_minus", "g_plus", "t")
        columns = [torch.as_tensor(value_of(getattr(self, name))) for name in names]
        found = []
        for alpha, beta, g_minus, g_plus, t in zip(*(column.tolist() for column in columns), strict=True):
            fixed = RESCU(alpha, beta, g_minus, g_plus, t, self.cdf, self.integral)
            found.append(fixed.dead_range_at(eps))
        low = columns[0].new_tensor([0.0 if f is None else float(f.low) for f in found])
        high = columns[0].new_tensor([0.0 if f is None else float(f.high) for f in found])
        return per_channel(low, high, torch.tensor([f is not None for f in found], device=low.device))

    def extra_repr(self) -> str:
        names = ("alpha", "beta", "g_minus", "g_plus", "t")
        fixed = [f"{n}={getattr(self, n)}" for n in names if isinstance(getattr(self, n), float)]
        return ", ".join(fixed)


class GSmeLU(RESCU):
    """Generalised SmeLU as a module: RESCU with the uniform CDF. With its defaults it is SmeLU with β = 0.5.

    Example:
        >>> GSmeLU(g_minus=0.1)(torch.tensor([2.0])).shape
        torch.Size([1])
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        g_minus: float = 0.0,
        g_plus: float = 1.0,
        t: float = 0.0,
        learnable: bool = False,
        num_parameters: int = 1,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            alpha, beta, g_minus, g_plus, t, uniform, uniform_integral, learnable, num_parameters, channel_dim
        )

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return gsmelu(x, **self._numbers(x))
