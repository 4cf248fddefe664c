"""Rectifiers with another backward pass, or another power: HeLU, squared ReLU, StarReLU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ap.activations import lean
from ap.activations.ranges import NEGATIVE, DeadRange, squared

_FEW = 3
"""Up to so many threads NumPy, which uses one, compares faster than torch."""
STAR_SCALE, STAR_BIAS = 1 / math.sqrt(1.25), -0.5 / math.sqrt(1.25)


class _HeLU(torch.autograd.Function):
    """Keeps one byte an element: where the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(_above(x, -alpha))
        return F.relu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (passes,) = ctx.saved_tensors
        if torch.is_grad_enabled() or grad.device.type != "cpu":
            return grad * passes, None
        # On a CPU bytes convert ten times as fast as bools.
        return torch.empty_like(grad).copy_(passes.view(torch.uint8)).mul_(grad), None


def _above(x: Tensor, bound: float) -> Tensor:
    """x > bound, as bools."""
    if not lean.is_plain_cpu(x):
        return x > bound
    if x.dtype in (torch.float32, torch.float64) and torch.get_num_threads() <= _FEW:
        bound = bound if bound >= torch.finfo(x.dtype).min else -math.inf
        return torch.from_numpy(np.asarray(np.greater(x.numpy(), bound)))
    # Compared into the input's type, then converted: several times faster than comparing into bools.
    return torch.gt(x, bound, out=torch.empty_like(x)).to(torch.bool)


class _HeLUInGraphs(torch.autograd.Function):
    """The same in plain operations. The mask is returned too, so that torch.func can batch it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        # Bytes made from floats: compiled for a CPU, storing and loading bools takes ten times as long.
        return F.relu(x), (x > -alpha).to(x.dtype).to(torch.uint8)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        (passes,) = ctx.saved_tensors
        return grad * passes.to(grad.dtype), None


class _HeLUInTransforms(_HeLUInGraphs):
    """With a forward-mode derivative, the surrogate too, which torch.compile would refuse."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        (passes,) = ctx.saved_tensors
        return tangent * passes.to(tangent.dtype), None


def helu(x: Tensor, alpha: float = 0.05) -> Tensor:
    """HeLU: ReLU forward, while the gradient passes for all x > −α (hysteresis; Kimhi et al. 2024).

    Its backward pass is a surrogate: units with −α < x ≤ 0 output nothing and yet learn.

    Args:
        x: any shape; the result has its dtype.
        alpha: α ≥ 0; 0 is ReLU, inf passes every gradient.

    Example:
        >>> x = torch.tensor([-1.0, -0.01, 1.0], requires_grad=True)
        >>> helu(x).sum().backward(); x.grad
        tensor([0., 1., 1.])
    """
    if not alpha >= 0:
        raise ValueError(f"alpha must be 0 or more, not {alpha}")
    # Not asked: x.requires_grad, which is False inside vmap even where the gradient is taken outside of it.
    if not torch.is_grad_enabled() or _exporting():
        return F.relu(x)
    if lean.is_everyday():
        return _HeLU.apply(x, float(alpha))  # type: ignore[no-any-return]
    function: Any = _HeLUInGraphs if torch.compiler.is_compiling() else _HeLUInTransforms
    return function.apply(x, float(alpha))[0]  # type: ignore[no-any-return]


def _exporting() -> bool:
    """Whether a graph for inference is being made, which has no backward pass."""
    check = getattr(torch.compiler, "is_exporting", None)
    return bool(check()) if check is not None else False


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)² (So et al. 2021, "Primer").

    >>> relu_squared(torch.tensor([-1.0, 3.0]))
    tensor([0., 9.])
    """
    r = F.relu(x)
    return r * r


def star_relu(x: Tensor, scale: float | Tensor = STAR_SCALE, bias: float | Tensor = STAR_BIAS) -> Tensor:
    """s·relu(x)² + b, whose output has mean 0 and variance 1 for a standard normal input (Yu et al. 2022).

    >>> star_relu(torch.zeros(1)).item() < 0
    True
    """
    scale, bias = (p.to(x.dtype) if isinstance(p, Tensor) else p for p in (scale, bias))
    return scale * relu_squared(x) + bias


def prelu(x: Tensor, weight: float | Tensor = 0.25) -> Tensor:
    """max(0, x) + a·min(0, x) (He et al. 2015), in the dtype of x: torch's own refuses a mix of dtypes.

    Args:
        x: any shape; channels on axis 1 where there is a slope a channel.
        weight: a number, or a tensor with 1 slope or one a channel.

    >>> prelu(torch.tensor([-2.0, 3.0], dtype=torch.float16), torch.tensor([0.5]))
    tensor([-1.,  3.], dtype=torch.float16)
    """
    if not isinstance(weight, Tensor):
        return F.leaky_relu(x, weight)
    return F.prelu(x, weight.to(x.dtype))


class PReLU(nn.PReLU):
    """torch.nn's PReLU, which also takes inputs of another dtype than its slopes; the result has the input's.

    >>> PReLU()(torch.tensor([-2.0], dtype=torch.bfloat16)).dtype
    torch.bfloat16
    """

    def forward(self, input: Tensor) -> Tensor:
        """Element by element."""
        return prelu(input, self.weight)


class HeLU(nn.Module):
    """HeLU as a module.

    Args:
        alpha: how far below 0 gradients still pass, α ≥ 0.

    Example:
        >>> HeLU(alpha=0.1)(torch.tensor([-0.05, 2.0]))
        tensor([0., 2.])
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        if not alpha >= 0:
            raise ValueError(f"alpha must be 0 or more, not {alpha}")
        self.alpha = float(alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return helu(x, self.alpha)

    @property
    def dead_range(self) -> DeadRange:
        """(−∞, 0]: where the output is 0 and its true derivative too."""
        return NEGATIVE

    @property
    def gradient_dead_range(self) -> DeadRange:
        """(−∞, −α]: where no gradient comes back."""
        return DeadRange(-math.inf, -self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class SquaredReLU(nn.Module):
    """relu(x)² as a module.

    >>> SquaredReLU()(torch.tensor([2.0]))
    tensor([4.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return relu_squared(x)

    @property
    def dead_range(self) -> DeadRange:
        """(−∞, 0]."""
        return squared(None)

    def dead_range_at(self, eps: float | None) -> DeadRange:
        """The same with |f| and |f'| at most eps."""
        return squared(eps)


class StarReLU(nn.Module):
    """s·relu(x)² + b as a module. Its dead range is that of the square: before the bias.

    Args:
        scale, bias: s and b.
        learnable: learn both; they are shared by all units.

    >>> StarReLU().dead_range.high
    0.0
    """

    def __init__(self, scale: float = STAR_SCALE, bias: float = STAR_BIAS, learnable: bool = False) -> None:
        super().__init__()
        self.scale: Any = nn.Parameter(torch.tensor([float(scale)])) if learnable else float(scale)
        self.bias: Any = nn.Parameter(torch.tensor([float(bias)])) if learnable else float(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return star_relu(x, self.scale, self.bias)

    @property
    def dead_range(self) -> DeadRange:
        """(−∞, 0]."""
        return self.dead_range_at(None)

    def dead_range_at(self, eps: float | None) -> DeadRange:
        """The same with |f − b| and |f'| at most eps."""
        scale = self.scale.detach() if isinstance(self.scale, Tensor) else self.scale
        return squared(eps, float(scale)) if eps else NEGATIVE
