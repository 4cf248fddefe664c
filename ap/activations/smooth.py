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

from ap.activations.parameters import Positive, along, free, value_of, wide
from ap.activations.ranges import DeadRange, per_channel, solve

Number = float | Tensor
FLOOR = 1e-6
"""A half-width below this is none: the function is then the one with a kink, since dividing by it would give NaN."""


class _SmeLU(torch.autograd.Function):
    """Keeps only its output, which the next layer keeps anyway: the slope is √(y/β) below y = β, and 1 above."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, beta: float) -> Tensor:
        # `_smelu`, in two buffers: without a graph nothing else is needed.
        t = x.add(beta).div_(2 * beta).clamp_(0, 1)
        return x.sub(beta).relu_().addcmul_(t, t, value=beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.beta = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return grad * (_Slope.apply(y, ctx.beta) if torch.is_grad_enabled() else _slope(y, ctx.beta)), None


class _Slope(torch.autograd.Function):
    """√(y/β) up to 1, whose own derivative is taken as 0 where y = 0: there the root's is infinite and y's is 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, beta: float) -> Tensor:
        return _slope(y, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.beta = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (t,) = ctx.saved_tensors
        return torch.where((t > 0) & (t < 1), grad / (2 * ctx.beta * t), torch.zeros_like(grad)), None


def _slope(y: Tensor, beta: float) -> Tensor:
    # √s as s·rsqrt(s): the root itself takes many times as long on a CPU where it meets a 0.
    s = y.div(beta).clamp_(max=1)
    return s.clamp(min=torch.finfo(s.dtype).tiny).rsqrt_().mul_(s)


def _between(x: Tensor, low: Number, high: Number) -> Tensor:
    """x clamped; the slope is 1 at the ends themselves, which torch.clamp leaves to its version."""
    return torch.where(x > high, high, torch.where(x < low, low, x))  # both select only, so no NaN can appear


def _smelu(x: Tensor, beta: Number) -> Tensor:
    t = (_between(x, -beta, beta) + beta) / (2 * beta)
    return beta * t * t + F.relu(x - beta)


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
        z = wide(x)
        return _smelu(z, beta.to(z.dtype).clamp(min=FLOOR)).to(x.dtype)
    _not_negative("beta", beta)
    if beta < FLOOR:
        return F.relu(x)
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return _smelu(x, beta)
    return _SmeLU.apply(x, float(beta))  # type: ignore[no-any-return]


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
    for name, width in (("alpha", alpha), ("beta", beta)):
        if not isinstance(width, Tensor):
            _not_negative(name, width)
    dtype = x.dtype
    if any(isinstance(p, Tensor) for p in (alpha, beta, g_minus, g_plus, t)):
        x = wide(x)
    alpha, beta, g_minus, g_plus, t = (
        p.to(x.dtype) if isinstance(p, Tensor) else p for p in (alpha, beta, g_minus, g_plus, t)
    )
    area = integral if integral is not None else _smoothstep_integral
    width = alpha + beta
    width = width.clamp(min=FLOOR) if isinstance(width, Tensor) else max(width, FLOOR)
    tau = (_between(x, -alpha, beta) + alpha) / width
    between = (g_plus - g_minus) * width * area(tau) + g_minus * width * tau
    return (between + _times(g_minus, -F.relu(-alpha - x)) + _times(g_plus, F.relu(x - beta)) + t).to(dtype)


def _times(slope: Number, part: Tensor) -> Tensor:
    """slope · part, where 0 · ∞ is 0 and no gradient is NaN."""
    if not isinstance(slope, Tensor):
        return slope * part if slope else torch.zeros_like(part)
    limit = torch.finfo(part.dtype).max
    infinite = part.isinf() & (slope != 0)
    return torch.where(infinite, slope.detach().sign() * part, slope * part.clamp(-limit, limit))


def _smoothstep(tau: Tensor) -> Tensor:
    return tau * tau * (3 - 2 * tau)


def _smoothstep_integral(tau: Tensor) -> Tensor:
    return tau**3 * (1 - tau / 2)


def _uniform(tau: Tensor) -> Tensor:
    return tau


def _uniform_integral(tau: Tensor) -> Tensor:
    return tau * tau / 2


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
    return rescu(x, alpha, beta, g_minus, g_plus, t, _uniform, _uniform_integral)


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
        names = ("alpha", "beta", "g_minus", "g_plus", "t")
        numbers = {name: along(getattr(self, name), x, self.channel_dim) for name in names}
        return rescu(x, **numbers, cdf=self.cdf, integral=self.integral)

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
            alpha, beta, g_minus, g_plus, t, _uniform, _uniform_integral, learnable, num_parameters, channel_dim
        )
