"""Products with a function of x itself: Swish with its β, and the growing cosine unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ap.activations import lean
from ap.activations.lean import Number
from ap.activations.parameters import along, free, value_of, wide, wide_dtype
from ap.activations.ranges import SMOOTH_EPS, DeadRange, numeric, per_channel


def _finite(x: Tensor) -> Tensor:
    """−∞ · 0 must not appear in x·σ: at the lowest finite number the sigmoid is exactly 0, and so is the product."""
    limit = torch.finfo(x.dtype).max
    return x.clamp(-limit, limit)


class _Compiled(torch.autograd.Function):
    """For a compiler, which makes one kernel of each direction; in autograd's own backward pass of the limits it does
    worse, up to twice the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.beta = beta
        z, limit = wide(x), torch.finfo(wide_dtype(x)).max
        finite = z.clamp(min=-limit) if beta > 0 else z.clamp(max=limit)  # where the sigmoid is 0
        return (finite * torch.sigmoid(beta * z)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        z = _finite(ctx.beta * wide(x))
        share = torch.sigmoid(z)
        return (wide(grad) * share * (1 + z * (1 - share))).to(x.dtype), None


def _plain(x: Tensor, beta: Number) -> Tensor:
    if torch.compiler.is_compiling() and not isinstance(beta, Tensor) and lean.is_only_differentiated():
        return _Compiled.apply(x, beta)  # type: ignore[no-any-return]
    if not isinstance(beta, Tensor) and beta == 1:
        return F.silu(x.clamp(min=torch.finfo(x.dtype).min))
    z = wide(x)
    beta = beta.to(z.dtype) if isinstance(beta, Tensor) else beta
    finite = _finite(z)
    # Back to ±∞ where x is: only the side on which the sigmoid is 0 needed the finite number.
    share = torch.sigmoid(beta * finite)
    return (torch.where(share > 0, z, finite) * share).to(x.dtype)


def _forward(x: Tensor, beta: Number) -> Tensor:
    if x.device.type != "cpu":
        return _plain(x, beta)
    known = _as(beta, x)
    if not isinstance(known, Tensor) and known == 1 and lean.is_finite(x):
        return F.silu(x)
    out = torch.empty_like(x)
    for a, y in lean.blocks((x, out), known):
        z = wide(a) * known
        if lean.is_finite(z):
            torch.mul(wide(a), z.sigmoid_(), out=y)
        else:
            y.copy_(_plain(a, known))
    return out


def _backward(grad: Tensor, x: Tensor, beta: Number, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    known = _as(beta, x)
    if not isinstance(beta, Tensor) and beta == 1 and x.device.type == "cpu" and lean.is_finite(x):
        return torch.ops.aten.silu_backward(grad, x), None
    out = torch.empty_like(grad) if needs[0] else None
    total = torch.zeros_like(beta, dtype=wide_dtype(x)) if needs[1] and isinstance(beta, Tensor) else None
    for g, a, *result in lean.blocks((grad, x, *([] if out is None else [out])), known):
        g, a = wide(g), wide(a)
        z = a * known
        if x.device.type != "cpu" or not lean.is_finite(z):
            a = _finite(a)
            z = _finite(a * known)
        for gradient in result:  # silu(βx)/β has the slope of SiLU at βx
            if gradient.dtype == g.dtype:
                torch.ops.aten.silu_backward.grad_input(g, z, grad_input=gradient)
            else:
                gradient.copy_(torch.ops.aten.silu_backward(g, z))
        if total is not None:
            total += lean.inner(torch.ops.aten.sigmoid_backward(g, torch.sigmoid(z)).mul_(a), a, total)  # g·x²·s(1 − s)
    return out, total


def _as(beta: Number, x: Tensor) -> Number:
    known = lean.number(beta)
    return known.to(wide_dtype(x)) if isinstance(known, Tensor) else known


_SWISH = lean.Rule(_plain, _forward, _backward)


def _plain_gcu(x: Tensor) -> Tensor:
    return x * torch.cos(x)


def _gcu_forward(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for a, y in lean.blocks((x, out)):
        torch.mul(a, torch.cos(a), out=y)
    return out


def _gcu_backward(grad: Tensor, x: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    out = torch.empty_like(grad)
    for g, a, result in lean.blocks((grad, x, out)):
        torch.mul(g, torch.cos(a).addcmul_(a, torch.sin(a), value=-1), out=result)
    return (out,)


_GCU = lean.Rule(_plain_gcu, _gcu_forward, _gcu_backward)


def swish(x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """Swish: x·σ(βx) (Ramachandran et al. 2017); SiLU at β = 1, x/2 at β = 0, ReLU as β → ∞.

    Args:
        x: any shape; the result has its dtype. At ±∞ the limits are returned.
        beta: a number, or a tensor that broadcasts.

    Example:
        >>> swish(torch.tensor([0.0, 1.0]), 0.0)
        tensor([0.0000, 0.5000])
    """
    if isinstance(beta, Tensor):
        return lean.call(_SWISH, x, beta)
    if not -math.inf <= beta <= math.inf:  # comparisons, which a compiler can guard on
        raise ValueError("beta must be a number, not NaN")
    if beta == 0:
        return x / 2
    if abs(beta) == math.inf:
        return F.relu(x) if beta > 0 else -F.relu(-x)
    return lean.call(_SWISH, x, float(beta))


def gcu(x: Tensor) -> Tensor:
    """Growing cosine unit: x·cos x (Noel et al. 2021). It oscillates, so at ±∞ it is NaN.

    >>> gcu(torch.tensor([0.0, torch.pi]))
    tensor([ 0.0000, -3.1416])
    """
    return lean.call(_GCU, x)


class Swish(nn.Module):
    """Swish as a module.

    Args:
        beta: β.
        learnable: learn β.
        num_parameters: 1 for a shared β, or the number of channels.
        channel_dim: the axis of the channels.

    Example:
        >>> [name for name, _ in Swish(learnable=True).named_parameters()]
        ['beta']
    """

    def __init__(
        self, beta: float = 1.0, learnable: bool = False, num_parameters: int = 1, channel_dim: int = 1
    ) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        if not math.isfinite(beta):
            raise ValueError(f"beta must be finite, not {beta}")
        self.beta: Any = free(beta, num_parameters) if learnable else float(beta)

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return swish(x, along(self.beta, x, self.channel_dim))

    @property
    def dead_range(self) -> DeadRange | None:
        """The tail where both value and slope are at most 0.01: the left one for β > 0."""
        return self.dead_range_at(None)

    def dead_range_at(self, eps: float | None) -> DeadRange | None:
        """The same with another eps."""
        limit = SMOOTH_EPS if eps is None else eps
        beta = value_of(self.beta)
        if not isinstance(beta, Tensor):
            return numeric("swish", limit, beta) if beta else None
        found = [numeric("swish", limit, float(b)) if float(b) else None for b in beta]
        low = torch.tensor([0.0 if f is None else float(f.low) for f in found], device=beta.device)
        high = torch.tensor([0.0 if f is None else float(f.high) for f in found], device=beta.device)
        return per_channel(low, high, torch.tensor([f is not None for f in found], device=beta.device))

    def extra_repr(self) -> str:
        return "" if isinstance(self.beta, Tensor) else f"beta={self.beta}"


class GCU(nn.Module):
    """x·cos x as a module. It cannot die: nowhere are its value and its slope 0 together.

    >>> GCU()(torch.zeros(1))
    tensor([0.])
    """

    dead_range = None

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return gcu(x)
