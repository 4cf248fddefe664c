"""Parameters of activations: fixed, or learnable, shared or per channel."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ap.activations.ranges import is_activation


class Positive(nn.Module):
    """A learnable positive number, or one a channel: the softplus of what is learned.

    Args:
        value: where it starts, > 0.
        num_parameters: 1, or the number of channels.
        name: for the error message.

    Example:
        >>> round(Positive(0.5, 1, "beta")().item(), 4)
        0.5
    """

    def __init__(self, value: float, num_parameters: int, name: str) -> None:
        super().__init__()
        if not value > 0:
            raise ValueError(f"a learnable {name} must start above 0, not at {value}")
        # The inverse of softplus, without overflow for large values.
        raw = value + math.log(-math.expm1(-value))
        self.raw = free(raw, num_parameters)

    def forward(self) -> Tensor:
        """[num_parameters]"""
        return F.softplus(self.raw)


def free(value: float, num_parameters: int) -> nn.Parameter:
    """A learnable number without bounds, or one a channel: [num_parameters]."""
    if num_parameters < 1:
        raise ValueError(f"num_parameters must be 1, or the number of channels, not {num_parameters}")
    return nn.Parameter(torch.full((num_parameters,), float(value)))


def along(parameter: float | Tensor | Positive, x: Tensor, dim: int) -> float | Tensor:
    """A number as it is; a parameter in the shape that broadcasts along the channels of `x`."""
    value = parameter() if isinstance(parameter, Positive) else parameter
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    if x.dim() <= dim or x.shape[dim] != value.numel():
        raise ValueError(
            f"an activation with {value.numel()} parameters needs that many channels on axis {dim}, "
            f"not an input of shape {list(x.shape)}"
        )
    return value.view([-1 if axis == dim % x.dim() else 1 for axis in range(x.dim())])


def wide(x: Tensor) -> Tensor:
    """Half precision as float32: sums over a batch, as a shared parameter's gradient is, do not fit it."""
    return x.to(wide_dtype(x))


def wide_dtype(x: Tensor) -> torch.dtype:
    """The type of `wide(x)`."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def value_of(parameter: float | Tensor | Positive) -> float | Tensor:
    """The value now, without a graph."""
    with torch.no_grad():
        value = parameter() if isinstance(parameter, Positive) else parameter
    return value.detach() if isinstance(value, Tensor) else value


def activation_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that belong to activations: PReLU's slope, a learnable β."""
    for module in model.modules():
        if is_activation(module):
            yield from module.parameters()


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups for an optimizer: activations' own parameters without weight decay, all others with it.

    Weight decay on PReLU's slope would pull the activation to ReLU (He et al. 2015).

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.PReLU())
        >>> [(len(group["params"]), group["weight_decay"]) for group in param_groups(model, 0.1)]
        [(2, 0.1), (1, 0.0)]
    """
    own = {id(parameter) for parameter in activation_parameters(model)}
    with_decay = [parameter for parameter in model.parameters() if id(parameter) not in own]
    without = [parameter for parameter in model.parameters() if id(parameter) in own]
    groups: list[dict[str, object]] = [{"params": with_decay, "weight_decay": weight_decay}]
    return [*groups, {"params": without, "weight_decay": 0.0}] if without else groups
