"""SynFlow: data-free pruning by conserved synaptic flow (Tanaka et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ap.graph_trace import unwrap
from ap.masks import Masks
from ap.slots import multiply_
from ap.warn import warn
from pruners.base import Batches, LossFn, Pruner, register, undisturbed

ROUNDS = 100


@register("synflow")
class SynFlow(Pruner):
    """|w · ∂R/∂w|, R the sum of the outputs for an input of ones with every parameter replaced by its absolute value.

    BatchNorm's statistics are replaced, too. In float64, evaluation mode and, by default, 100 rounds. What the paper
    does not define (ours): ReLU6 and Hardtanh do not clip above, sigmoids are constant gates, LayerNorm, GroupNorm and
    RMSNorm only scale and shift. A layer that no path outside of gates joins to the output is not followed: a warning
    names it, and it goes last. So does the best weight of each layer, since beside a shortcut a layer could empty.
    Attention is refused.

    Args:
        example_input: a tensor of the input's shape [N, …], or a tuple of the forward pass's arguments; only the shapes
            matter. Not needed where `prune` and `scores` get batches.

    Raises:
        ValueError: neither example_input nor batches, an input that is not floating point, or attention in the model.
    """

    rounds = ROUNDS

    def __init__(self, example_input: Any = None) -> None:
        self.example_input = example_input

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """|w · ∂R/∂w| (Tanaka et al. 2020, equation 3), float64."""
        plain = unwrap(model)
        inputs = self._ones(plain, batches)
        state, keys = _absolute(plain, masks)
        gradients = _gradients(plain, state, keys, inputs)
        # Made in place of the weights, which nothing reads any more: fresh memory would cost more than the product.
        scores = {name: state[keys[name]].mul_(gradient).abs_() for name, gradient in gradients.items()}
        cut = [name for name in masks if not bool(scores[name].sum() > 0)]
        if cut and len(cut) < len(masks):
            # Cut off by pruning, or never followed? With all weights of a layer alike only the structure is left.
            even = {keys[name]: torch.full_like(state[keys[name]], 1 / max(1, _fan_in(masks[name]))) for name in masks}
            structure = _gradients(plain, {**state, **even}, keys, inputs)
            unfollowed = [name for name in cut if not bool(structure[name].any())]
            if unfollowed:
                warn(f"synflow cannot follow {', '.join(unfollowed)} to the output; they are pruned last")
            for name in unfollowed:
                scores[name].fill_(torch.finfo(scores[name].dtype).max)
        return scores

    def protected(self, scores: Mapping[str, Tensor], masks: Masks) -> Mapping[str, Tensor]:
        """Each layer's best weight goes last (ours): beside a shortcut flow is conserved without it."""
        for name, score in scores.items():
            if score.numel():
                best = torch.unravel_index(score.argmax(), score.shape)
                if not bool(score[best] > 0):  # dead weights have no flow, so that only then they could be the best
                    best = torch.unravel_index(masks[name].byte().argmax(), score.shape)
                score[best] = torch.finfo(score.dtype).max
        return scores

    def _ones(self, model: nn.Module, batches: Batches | None) -> tuple[Any, ...]:
        """The forward pass's arguments: one sample of ones."""
        example = self.example_input
        if example is None:
            if batches is None:
                raise ValueError(
                    "synflow needs the input's shape: give it batches=, or pruners.create('synflow', example_input=…)"
                )
            batch = next(iter(batches))
            example = batch[0] if isinstance(batch, (tuple, list)) else batch
        arguments = tuple(example) if isinstance(example, (tuple, list)) else (example,)
        for value in arguments:
            if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
                raise ValueError(
                    "synflow feeds ones, so every input must be a floating-point tensor [N, …], not "
                    + (f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value))
                )
        device = _device(model)
        return tuple(torch.ones(1, *value.shape[1:], dtype=torch.float64, device=device) for value in arguments)


def _device(model: nn.Module) -> torch.device:
    """Where the model is; the CPU where there is no float64."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "mps" else device


def _fan_in(mask: Tensor) -> int:
    return mask[0].numel() if mask.dim() else 1


def _absolute(model: nn.Module, masks: Masks) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every parameter and floating buffer as its absolute value in float64, and the key of each masked weight."""
    device = _device(model)
    owners = {id(masks.weight(name)): name for name in masks}
    state, keys = {}, {}
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.is_floating_point():
            continue
        state[key] = value.detach().to(device, torch.float64, copy=True).abs_()
        name = owners.get(id(value))
        if name is not None:
            multiply_(state[key], masks[name].to(device))
            keys[name] = key
    return state, keys


def _gradients(
    model: nn.Module, state: Mapping[str, Tensor], keys: Mapping[str, str], inputs: tuple[Any, ...]
) -> dict[str, Tensor]:
    """∂R/∂w of the masked weights."""
    leaves = {key: state[key].detach().requires_grad_() for key in keys.values()}
    with undisturbed(model), torch.enable_grad(), _Flow():
        outputs = torch.func.functional_call(model, {**state, **leaves}, inputs)
        floating = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]
        flow = torch.stack([x.sum() for x in floating]).sum()
    if not flow.requires_grad:
        return {name: torch.zeros_like(leaves[key]) for name, key in keys.items()}
    found = torch.autograd.grad(flow, [leaves[key] for key in keys.values()], allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaves[key]) if gradient is None else gradient
        for (name, key), gradient in zip(keys.items(), found, strict=True)
    }
    for name, gradient in gradients.items():
        if not bool(torch.isfinite(gradient.sum())) and not bool(torch.isfinite(gradient).all()):
            raise ValueError(
                f"synflow: the flow through {name} exceeds even float64; is the model very deep or ungainly?"
            )
    return gradients


def _gate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *rest, **options: function(x.detach())


def _layer_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
    return x if weight is None else x * weight


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *rest: Any, **options: Any
) -> Tensor:
    shape = (-1, *(1,) * (x.dim() - 2))  # of one number a channel
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def _refuse(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise ValueError(
            f"synflow is not defined through {function.__name__}: products of activations do not conserve the flow, "
            "and a softmax of positive numbers has none. For attention use another pruner, e.g. lamp or snip"
        )

    return refuse


_RULES: dict[Any, Callable[..., Tensor]] = {
    F.relu6: lambda x, *rest, **options: x.relu(),
    F.hardtanh: lambda x, low=-1.0, *rest, **options: x.clamp(min=options.get("min_val", low)),
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
}
_RULES |= {f: _gate(torch.sigmoid) for f in (torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid)}
_RULES |= {F.hardsigmoid: _gate(F.hardsigmoid)}
_RULES |= {
    f: _refuse(f)
    for f in (
        F.softmax,
        torch.softmax,
        Tensor.softmax,
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
    )
}


class _Flow(TorchFunctionMode):
    """Runs a model by SynFlow's rules for what is not linear."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _RULES.get(func, func)(*args, **(kwargs or {}))
