"""Products with a function of x itself: Swish with its β, and the growing cosine unit."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ap.activations.parameters import along, free, value_of, wide
from ap.activations.ranges import SMOOTH_EPS, DeadRange, numeric, per_channel


class _SwishFixed(torch.autograd.Function):
    """For a number β: keeps x alone, like SiLU, whose kernels it uses: silu(βx)/β has the slope of SiLU at βx."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, beta: float) -> Tensor:
        return _fixed(x, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.beta = inputs[1]
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        z = _finite(x if ctx.beta == 1 else x * ctx.beta)
        if not torch.is_grad_enabled():
            return torch.ops.aten.silu_backward(grad, z), None
        s = torch.sigmoid(z)  # the fused kernel has no derivative of its own
        return grad * (s + z * s * (1 - s)), None


def _fixed(x: Tensor, beta: float) -> Tensor:
    if beta == 1:
        return F.silu(x.clamp(min=torch.finfo(x.dtype).min), inplace=True)
    z = x.float() if x.dtype == torch.float16 else x  # βx may be beyond float16 where x·σ(βx) is not
    return F.silu((z * beta).clamp_(min=torch.finfo(z.dtype).min), inplace=True).div_(beta).to(x.dtype)


def _finite(x: Tensor) -> Tensor:
    """−∞ · 0 must not appear in x·σ: at the lowest finite number the sigmoid is exactly 0, and so is the product."""
    limit = torch.finfo(x.dtype).max
    return x.clamp(-limit, limit)


class _Swish(torch.autograd.Function):
    """For a learnable β: keeps x alone and computes the sigmoid again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, beta: Tensor) -> Tensor:
        return _swish(x, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, beta = ctx.saved_tensors
        x = _finite(wide(x))
        b = beta.to(x.dtype)
        s = torch.sigmoid(b * x)
        slope = x * s * (1 - s)
        by_beta = (wide(grad) * (x * slope)).sum_to_size(beta.shape)
        return (grad * (s + b * slope)).to(grad.dtype), by_beta.to(beta.dtype)


def _swish(x: Tensor, beta: Tensor) -> Tensor:
    dtype = x.dtype
    x = wide(x)
    beta = beta.to(x.dtype)
    finite = _finite(x)
    # Back to +∞ where x is: only the side on which the sigmoid is 0 needed the finite number.
    return (torch.where(x == torch.inf, x, finite) * torch.sigmoid(beta * finite)).to(dtype)


class _GCU(torch.autograd.Function):
    """Keeps x alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * torch.cos(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * (torch.cos(x) - x * torch.sin(x))


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
        return _swish(x, beta) if torch.compiler.is_compiling() else _Swish.apply(x, beta)  # type: ignore[no-any-return]
    if math.isnan(beta):
        raise ValueError("beta must be a number, not NaN")
    if beta == 0:
        return x / 2
    if math.isinf(beta):
        return F.relu(x) if beta > 0 else -F.relu(-x)
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return _fixed(x, beta)
    return _SwishFixed.apply(x, float(beta))  # type: ignore[no-any-return]


def gcu(x: Tensor) -> Tensor:
    """Growing cosine unit: x·cos x (Noel et al. 2021). It oscillates, so at ±∞ it is NaN.

    >>> gcu(torch.tensor([0.0, torch.pi]))
    tensor([ 0.0000, -3.1416])
    """
    return x * torch.cos(x) if torch.compiler.is_compiling() else _GCU.apply(x)  # type: ignore[no-any-return]


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
