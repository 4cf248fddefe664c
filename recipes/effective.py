"""What a density hides: weights that no path connects, and multiplications that remain."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ap.activations import is_activation
from ap.masks import Masks

_IDENTITY = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.dropout._DropoutNd,
)
_AVERAGE = {nn.MaxPool1d: nn.AvgPool1d, nn.MaxPool2d: nn.AvgPool2d, nn.MaxPool3d: nn.AvgPool3d}


@dataclass(frozen=True)
class Effective:
    """Counts over the prunable weights of a model.

    Attributes:
        density: weights on some path from the input to the output, over all weights.
        macs: multiplications for one input that the living weights need (those of attention itself are left out).
        dense_macs: the same, if no weight were dead.
    """

    density: float
    macs: int
    dense_macs: int


def effective(model: nn.Module, masks: Masks, input_shape: tuple[int, ...]) -> Effective:
    """Effective density (Vysogorets & Kempe 2023) and multiplications, for an input of shape [C, H, W].

    One pass forwards and one backwards through a copy of the model in which living weights are random positive
    numbers, biases are 0, and normalisation and activations do nothing, in float64: a weight has no gradient if
    nothing arrives at it or nothing leaves from it. Constants that come from biases count as nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> masks = Masks(model)
        >>> _ = masks.prune({"0.weight": torch.tensor([[0.0, 0.0], [1.0, 1.0]]), "2.weight": torch.ones(1, 2)}, count=2)
        >>> effective(model, masks, (2,)).density  # the first hidden unit is cut off, so its outgoing weight is idle
        0.5
    """
    network = copy.deepcopy(model)
    _strip_hooks(network)
    network = _without_nonlinearities(network).double().cpu().eval()
    generator = torch.Generator().manual_seed(0)
    copied = Masks(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for name in masks:
            alive = masks[name].cpu()
            weight = copied.weight(name)
            rows = max(1, int(alive.flatten(1).any(1).sum()))
            # Divided by the mean number of living inputs of a row, so that deep networks neither overflow nor vanish.
            scale = rows / max(1, int(alive.sum()))
            # Random, so that nothing cancels where signs differ (attention's softmax) and no maximum is tied.
            weight.copy_((0.5 + torch.rand(weight.shape, generator=generator, dtype=torch.float64)) * alive * scale)
            weight.requires_grad_(True)
        _open_paths_without_masks(network, {id(copied.weight(name)) for name in copied}, generator)
    macs: list[tuple[int, int]] = []
    handles = [
        module.register_forward_hook(_counter(macs))
        for module in network.modules()
        if isinstance(module, (_ConvNd, nn.Linear, nn.MultiheadAttention))
    ]
    x = 0.5 + torch.rand((1, *input_shape), generator=generator, dtype=torch.float64)
    with torch.enable_grad():
        output = network(x)
    for handle in handles:
        handle.remove()
    weights = [copied.weight(name) for name in masks]
    gradients = torch.autograd.grad(_first_tensor(output).sum(), weights, allow_unused=True)
    on_path = sum(
        int(torch.count_nonzero((gradient != 0) & (weight != 0)))
        for weight, gradient in zip(weights, gradients, strict=True)
        if gradient is not None
    )
    return Effective(on_path / masks.total, sum(alive for alive, _ in macs), sum(total for _, total in macs))


def _strip_hooks(model: nn.Module) -> None:
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def _without_nonlinearities(module: nn.Module) -> nn.Module:
    if is_activation(module) or isinstance(module, _IDENTITY):
        return nn.Identity()
    kind = type(module)
    if kind in _AVERAGE:  # a maximum passes the gradient on to one of its inputs only
        pool: Any = module
        return _AVERAGE[kind](pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)
    for name, child in module.named_children():
        setattr(module, name, _without_nonlinearities(child))
    return module


def _open_paths_without_masks(network: nn.Module, masked: set[int], generator: torch.Generator) -> None:
    """Weights that nobody prunes (of layers that were excluded, position embeddings) let everything pass."""
    for name, parameter in network.named_parameters():
        if id(parameter) not in masked and parameter.dim() > 1:
            fan_in = max(1, math.prod(parameter.shape[1:]))
            draw = 0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(draw / fan_in)
        elif id(parameter) not in masked and "scale" in name.lower():
            parameter.fill_(1.0)  # layer scale and the like multiply a whole branch


def _counter(macs: list[tuple[int, int]]) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        out = _first_tensor(output)
        if isinstance(module, _ConvNd):
            positions = math.prod(out.shape[2:])
            parts = [module.weight]
        elif isinstance(module, nn.Linear):
            positions = math.prod(out.shape[:-1])
            parts = [module.weight]
        else:
            positions = math.prod(inputs[0].shape[:-1])
            parts = [p for name, p in module.named_parameters(recurse=True) if name.endswith("weight")]
        for weight in parts:
            macs.append((int(torch.count_nonzero(weight)) * positions, weight.numel() * positions))

    return hook


def _first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
