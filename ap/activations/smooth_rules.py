"""SmeLU and its relatives in plain operations, and in the lean kernels that stand for them in eager training.

With d = x + α, s = α + β and τ = clamp(d/s, 0, 1), every one of them is
t + g₋·min(d, s) + (g₊ − g₋)·s·A(τ) + g₊·relu(d − s), A being the integral of the CDF F along which the slope goes,
g₋ + (g₊ − g₋)·F(τ) (Shamir, Lin and Coviello 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ap.activations.lean import Number, Rule, blocks, inner, is_finite, number
from ap.activations.parameters import wide, wide_dtype

FLOOR = 1e-6
"""A half-width below this is none: the function is then the one with a kink, since dividing by it would give NaN."""
Transition = Callable[[Tensor], Tensor]
aten = torch.ops.aten


# --- plain -----------------------------------------------------------------------------------------------------------


def between(x: Tensor, low: Number, high: Number) -> Tensor:
    """x clamped; the slope is 1 at the ends themselves, which torch.clamp leaves to its version."""
    return torch.where(x > high, high, torch.where(x < low, low, x))  # both select only, so no NaN can appear


def plain_smelu(x: Tensor, beta: Number) -> Tensor:
    """SmeLU; β at least `FLOOR`."""
    dtype = x.dtype
    if isinstance(beta, Tensor):
        x = wide(x)
        beta = beta.to(x.dtype).clamp(min=FLOOR)
    t = (between(x, -beta, beta) + beta) / (2 * beta)
    return (beta * t * t + F.relu(x - beta)).to(dtype)


def plain_rescu(
    x: Tensor,
    alpha: Number,
    beta: Number,
    g_minus: Number,
    g_plus: Number,
    t: Number,
    *,
    integral: Transition,
) -> Tensor:
    """RESCU; only the integral enters the value, and its derivative is the CDF."""
    dtype = x.dtype
    if any(isinstance(p, Tensor) for p in (alpha, beta, g_minus, g_plus, t)):
        x = wide(x)
    alpha, beta, g_minus, g_plus, t = (
        p.to(x.dtype) if isinstance(p, Tensor) else p for p in (alpha, beta, g_minus, g_plus, t)
    )
    width = _width(alpha, beta)
    tau = (between(x, -alpha, beta) + alpha) / width
    inside = (g_plus - g_minus) * width * integral(tau) + g_minus * width * tau
    return (inside + _times(g_minus, -F.relu(-alpha - x)) + _times(g_plus, F.relu(x - beta)) + t).to(dtype)


def _width(alpha: Number, beta: Number) -> Number:
    width = alpha + beta
    return width.clamp(min=FLOOR) if isinstance(width, Tensor) else max(width, FLOOR)


def _times(slope: Number, part: Tensor) -> Tensor:
    """slope · part, where 0 · ∞ is 0 and no gradient is NaN."""
    if not isinstance(slope, Tensor):
        return slope * part if slope else torch.zeros_like(part)
    limit = torch.finfo(part.dtype).max
    infinite = part.isinf() & (slope != 0)
    return torch.where(infinite, slope.detach().sign() * part, slope * part.clamp(-limit, limit))


# --- SmeLU and its like with fixed numbers: only the output is kept --------------------------------------------------


class Rise(torch.autograd.Function):
    """0 up to −α, (x + α)²/2s up to s − α, then x + α − s/2. Keeps only its output, which the next layer keeps anyway.

    The slope is √(2y/s) as long as that is below 1, and then 1.
    """

    @staticmethod
    def forward(x: Tensor, alpha: float, width: float) -> Tensor:
        return rise(x, alpha, width)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        ctx.width = inputs[2]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _rise_backward(grad, y, ctx.width), None, None
        # To be differentiated again. The root's own slope at 0 is infinite, so that it must not see the ends.
        end = ctx.width / 2
        inside = (y > 0) & (y < end)
        slope = torch.where(inside, torch.where(inside, y / end, 1).sqrt(), (y >= end).to(y.dtype))
        return grad * slope, None, None


def rise(x: Tensor, alpha: float, width: float) -> Tensor:
    """The value of `Rise`: a smooth L1 loss is that function on its right side."""
    out = torch.empty_like(x)
    for a, y in blocks((x, out)):
        wide_y = wide(y)  # itself, or another buffer: older versions have no smooth L1 loss in float16 on a CPU
        _half_parabola(wide(a), alpha, width, wide_y)
        if wide_y is not y:
            y.copy_(wide_y)
    return out


def _half_parabola(x: Tensor, alpha: float, width: Number, out: Tensor) -> None:
    torch.clamp(x, min=-alpha, out=out)
    aten.smooth_l1_loss.out(out, out.new_full((), -alpha).expand_as(out), 0, width, out=out)


def _rise_backward(grad: Tensor, y: Tensor, width: float) -> Tensor:
    """The slope of a smooth L1 loss goes up to 1 as √y does up to √(s/2)."""
    out = torch.empty_like(grad)
    info = torch.finfo(y.dtype)
    end = math.sqrt(width / 2) * (1 - 4 * info.eps)  # so that rounding leaves the slope at the end itself exactly 1
    zero = y.new_zeros((), dtype=wide_dtype(y))
    for g, value, result in blocks((grad, y, out)):
        value, wide_result = wide(value), wide(result)
        # √y as y/√y: the root itself takes twenty times as long on a CPU where it meets zeros.
        root = value.clamp(info.tiny, width / 2).rsqrt_().mul_(value)
        aten.smooth_l1_loss_backward.grad_input(wide(g), root, zero.expand_as(root), 0, end, grad_input=wide_result)
        if wide_result is not result:
            result.copy_(wide_result)
    return out


# --- SmeLU with a learnable β ----------------------------------------------------------------------------------------


def _smelu_forward(x: Tensor, beta: Tensor) -> Tensor:
    width = number(beta)
    if not isinstance(width, Tensor) and wide(x).dtype == x.dtype:
        width = max(width, FLOOR)
        return rise(x, width, 2 * width)
    out = torch.empty_like(x)
    width = beta.to(wide_dtype(x)).clamp(min=FLOOR)
    for a, y in blocks((x, out), beta):
        above = (wide(a) + width).clamp_(min=0)
        t = (above / (2 * width)).clamp_(max=1)
        torch.mul(above.addcmul_(t, width, value=-1), t, out=y)
    return out


def _smelu_backward(grad: Tensor, x: Tensor, beta: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    out = torch.empty_like(grad) if needs[0] else None
    width = beta.to(wide_dtype(x)).clamp(min=FLOOR)
    total = torch.zeros_like(width)
    half = number(0.5 / width)
    for g, a, *result in blocks((grad, x, *([] if out is None else [out])), beta):
        t = (wide(a) * half).add_(0.5).clamp_(0, 1)
        if out is not None:
            torch.mul(g, t, out=result[0])
        if needs[1]:
            total += torch.ops.aten.sigmoid_backward(wide(g), t).sum_to_size(beta.shape)  # g·t·(1 − t)
    return out, total if needs[1] else None


SMELU = Rule(plain_smelu, _smelu_forward, _smelu_backward)


# --- gSmeLU and RESCU ------------------------------------------------------------------------------------------------


def uniform(tau: Tensor) -> Tensor:
    """The CDF of the uniform distribution on [0, 1]."""
    return tau


def uniform_integral(tau: Tensor) -> Tensor:
    """Its integral from 0."""
    return tau * tau / 2


def smoothstep(tau: Tensor) -> Tensor:
    """3τ² − 2τ³."""
    square = tau * tau
    return torch.addcmul(3 * square, square, tau, value=-2)


def smoothstep_integral(tau: Tensor) -> Tensor:
    """τ³ − τ⁴/2."""
    cube = tau**3
    return torch.addcmul(cube, cube, tau, value=-0.5)


def _rule(cdf: Transition, integral: Transition) -> Rule:
    """The rule of a transition whose two functions hold no parameters of their own."""

    def plain(x: Tensor, *numbers: Number) -> Tensor:
        return plain_rescu(x, *numbers, integral=integral)

    def forward(x: Tensor, *numbers: Number) -> Tensor:
        if x.device.type != "cpu":
            return plain(x, *numbers)
        out = torch.empty_like(x)
        known = [_as(number(p), wide_dtype(x)) for p in numbers]
        parabola = cdf is uniform and not any(isinstance(p, Tensor) for p in known)
        exact = known[2] == 0 if parabola else not any(isinstance(p, Tensor) for p in known[2:4])
        for a, y in blocks((x, out), *known):
            if not exact and not is_finite(a):
                y.copy_(plain(a, *numbers))  # where 0 · ∞ or ∞ − ∞ might appear
            elif parabola:
                _parabola(a, y, known)
            else:
                _transition(a, y, known, integral)
        return out

    def backward(grad: Tensor, x: Tensor, *rest: Any) -> Sequence[Tensor | None]:
        return _backward(cdf, integral, grad, x, rest[:5], rest[5])

    return Rule(plain, forward, backward)


def _as(parameter: Number, dtype: torch.dtype) -> Number:
    return parameter.to(dtype) if isinstance(parameter, Tensor) else parameter


def _transition(x: Tensor, out: Tensor, numbers: Sequence[Number], integral: Transition) -> None:
    """The value in one block, whatever the transition and the shapes of the parameters."""
    alpha, beta, g_minus, g_plus, t = numbers
    width = _width(alpha, beta)
    above = wide(x) + alpha
    y = (above - width).relu_()
    if not isinstance(g_plus, Tensor) and g_plus == 0:
        y.zero_()  # also where there was ∞
    elif isinstance(g_plus, Tensor) or g_plus != 1:
        y *= g_plus
    if isinstance(g_minus, Tensor) or g_minus != 0:
        y.addcmul_(_at_most(above, width), torch.as_tensor(g_minus, dtype=y.dtype))
    area = integral(_share(above, width))
    y.addcmul_(area, torch.as_tensor((g_plus - g_minus) * width, dtype=y.dtype))
    torch.add(y, t, out=out)


def _share(above: Tensor, width: Number) -> Tensor:
    return (above / width).clamp_(0, 1)


def _at_most(values: Tensor, limit: Number) -> Tensor:
    return values.minimum(limit) if isinstance(limit, Tensor) else values.clamp(max=limit)


def _backward(
    cdf: Transition, integral: Transition, grad: Tensor, x: Tensor, numbers: Sequence[Number], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    dtype = wide_dtype(x)
    known = [_as(number(p), dtype) for p in numbers]
    parabola = cdf is uniform and x.device.type == "cpu" and not any(isinstance(p, Tensor) for p in known)
    out = torch.empty_like(grad) if needs[0] else None
    totals = [
        torch.zeros_like(p, dtype=dtype) if need and isinstance(p, Tensor) else None
        for p, need in zip(numbers, needs[1:], strict=True)
    ]
    for g, a, *result in blocks((grad, x, *([] if out is None else [out])), *known):
        if parabola and (not any(needs[1:]) or is_finite(a)):
            _parabola_backward(g, a, known, result, totals)
        else:
            _transition_backward(cdf, integral, g, a, known, result, totals)
    return out, *totals


def _transition_backward(
    cdf: Transition,
    integral: Transition,
    grad: Tensor,
    x: Tensor,
    numbers: Sequence[Number],
    result: Sequence[Tensor],
    totals: Sequence[Tensor | None],
) -> None:
    """Writes the gradient of x in one block, adds to those of the parameters: one sum of products each."""
    alpha, beta, g_minus, g_plus, _ = numbers
    width, change = _width(alpha, beta), g_plus - g_minus
    g, above = wide(grad), wide(x) + alpha
    tau = _share(above, width)
    slope = cdf(tau)
    for out in result:
        torch.mul(g, slope * change + g_minus, out=out)
    if all(total is None for total in totals):
        return
    limit = torch.finfo(above.dtype).max
    above.clamp_(-limit, limit)  # as 0 · ∞ must not appear
    area = integral(tau)
    rest, grown = area - tau * slope, area * width
    factors = (  # the derivatives by α, β, g₋ and g₊; that by t is 1
        (rest + slope) * change + g_minus,
        rest * change,
        _at_most(above, width).sub_(grown),
        (above - width).relu_().add_(grown),
    )
    for total, factor in zip(totals, factors, strict=False):
        if total is not None:
            total += inner(g, factor, total)
    if totals[4] is not None:
        totals[4] += g.sum_to_size(totals[4].shape)


# The parabola of the uniform transition with one number for each parameter: a smooth L1 loss h, in fewer passes.


def _parabola(x: Tensor, out: Tensor, numbers: Sequence[Any]) -> None:
    """t + g₋·(x + α) + (g₊ − g₋)·h in one block."""
    alpha, beta, g_minus, g_plus, t = numbers
    y = wide(out)
    _half_parabola(wide(x), alpha, _width(alpha, beta), y)
    if g_plus - g_minus != 1:
        y *= g_plus - g_minus
    if g_minus != 0:
        y.add_(wide(x), alpha=g_minus)
    if y is not out or g_minus * alpha + t != 0:
        torch.add(y, g_minus * alpha + t, out=out)


def _parabola_backward(
    grad: Tensor, x: Tensor, numbers: Sequence[Any], result: Sequence[Tensor], totals: Sequence[Tensor | None]
) -> None:
    """The gradients in one block: with h' = τ they need the sums of g, gτ, gτ², gh and g·(x − h)."""
    alpha, beta, g_minus, g_plus, _ = numbers
    width, change = _width(alpha, beta), g_plus - g_minus
    g, a = wide(grad), wide(x)
    right = a.clamp(min=-alpha)
    corner = right.new_full((), -alpha).expand_as(right)
    by_tau = aten.smooth_l1_loss_backward(g, right, corner, 0, width)  # g·τ
    for out in result:
        if g_minus == 0:
            torch.mul(by_tau, change, out=out)
        else:
            torch.add(by_tau * change, g, alpha=g_minus, out=out)
    if all(total is None for total in totals):
        return
    h = aten.smooth_l1_loss(right, corner, 0, width)
    by_square = aten.smooth_l1_loss_backward(by_tau, right, corner, 0, width)  # g·τ²
    flat, half_square = g.reshape(-1), by_square.sum() / 2
    whole = g.sum()
    gradients = (
        g_minus * whole + change * (by_tau.sum() - half_square),
        -change * half_square,
        torch.dot(flat, (a - h).reshape(-1)) + alpha * whole,
        torch.dot(flat, h.reshape(-1)),
        whole,
    )
    for total, gradient in zip(totals, gradients, strict=True):
        if total is not None:
            total += gradient


SMOOTHSTEP = _rule(smoothstep, smoothstep_integral)
UNIFORM = _rule(uniform, uniform_integral)
