"""Wanda: weights times the norm of their inputs (Sun et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ap.masks import Masks
from ap.ranks import reduce_over_ranks
from pruners.base import Batches, LossFn, Pruner, register, run_batches


@register("wanda")
class Wanda(Pruner):
    """|w| · ‖x_j‖₂, compared within one output row. Linear layers, convolutions and attention's projections.

    x_j is the input that the weight is multiplied by: a feature over all samples and tokens, or, in a convolution, a
    position of the unfolded input. Batches need no targets.
    """

    scope = "row"
    takes = ("rounds",)
    needs_data = True
    needs_loss = False

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """|w| · ‖x_j‖₂ (Sun et al. 2023, equation 1), in evaluation mode."""
        squares = input_squares(model, masks, self.require_batches(batches))
        return {name: masks.weight(name).detach().abs() * squares[name].sqrt_() for name in masks}


def input_squares(model: nn.Module, masks: Masks, batches: Batches) -> dict[str, Tensor]:
    """Σ x_j² over all batches for each masked weight, of a shape that broadcasts with it, float32.

    Raises:
        ValueError: a layer that is none of those known, or that no batch reaches.
    """
    squares: dict[str, Tensor] = {}

    def add(name: str, square: Tensor) -> None:
        squares[name] = squares[name] + square if name in squares else square

    with _watched(masks, add):
        run_batches(model, batches)
    for name in masks:
        if name not in squares:
            raise ValueError(f"{name} saw no input in the batches given, so wanda cannot score it: exclude it")
    reduce_over_ranks(squares.values())
    return squares


@contextmanager
def _watched(masks: Masks, add: Callable[[str, Tensor], None]) -> Iterator[None]:
    handles = []
    again: set[nn.Module] = set()  # attention that runs a second time, for what its output projection sees
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would go around the hooks
    try:
        for name in masks:
            module, owned = masks.module(name), name.rpartition(".")[2]
            parent = _attention_of(masks, module)
            if parent is not None:
                handles.append(parent.register_forward_hook(_attended(name, module, add, again), with_kwargs=True))
            elif isinstance(module, nn.MultiheadAttention):
                handles.append(module.register_forward_pre_hook(_projected(name, owned, add, again), with_kwargs=True))
            elif isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(_linear(name, add)))
            elif isinstance(module, _ConvNd) and not module.transposed:
                handles.append(module.register_forward_pre_hook(_convolved(name, add)))
            else:
                raise ValueError(
                    f"{name}: wanda is not defined for a {type(module).__name__}; exclude it from the masks"
                )
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()


def _attention_of(masks: Masks, module: nn.Module) -> nn.MultiheadAttention | None:
    """The attention whose output projection this is: it multiplies by the weight without calling the module."""
    for candidate in masks.model.modules():
        if isinstance(candidate, nn.MultiheadAttention) and candidate.out_proj is module:
            return candidate
    return None


def _features(x: Tensor) -> Tensor:
    """Σ x² over all but the last axis, [features]."""
    return x.detach().float().square().flatten(0, -2).sum(0)


def _linear(name: str, add: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        add(name, _features(args[0])[None])

    return hook


def _convolved(name: str, add: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(module: _ConvNd, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        spatial = len(module.kernel_size)
        x = x if x.dim() == spatial + 2 else x[None]
        if any(module._reversed_padding_repeated_twice):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        square = x.float().square().sum(0)  # [C, *positions]
        for axis, (kernel, step, gap) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, strict=True)
        ):
            # Every window along this axis, and in it the elements that the kernel meets, last.
            square = square.unfold(axis + 1, gap * (kernel - 1) + 1, step)[..., ::gap]
        square = square.sum(tuple(range(1, spatial + 1)))  # [C, *kernel]
        rows = module.out_channels // module.groups
        square = square.reshape(module.groups, -1, *module.kernel_size).repeat_interleave(rows, dim=0)
        add(name, square if module.groups > 1 else square[:1])

    return hook


def _projected(name: str, owned: str, add: Callable[[str, Tensor], None], again: set[nn.Module]) -> Callable[..., None]:
    """Attention's input projections: the query's features meet the first rows, then the key's, then the value's."""

    def hook(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module in again:
            return
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        parts = (
            ("query", "key", "value")
            if owned == "in_proj_weight"
            else {"q": ("query",), "k": ("key",)}.get(owned[0], ("value",))
        )
        add(name, torch.stack([_features(given[part]) for part in parts]).repeat_interleave(module.embed_dim, dim=0))

    return hook


def _attended(
    name: str, projection: nn.Module, add: Callable[[str, Tensor], None], again: set[nn.Module]
) -> Callable[..., None]:
    """The input of attention's output projection: attention's own output with the identity for a projection."""

    def hook(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module in again:
            return
        weight = projection.get_parameter("weight")
        plain = {"out_proj.weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
        if projection.bias is not None:
            plain["out_proj.bias"] = torch.zeros_like(weight[0])
        again.add(module)
        try:
            add(name, _features(torch.func.functional_call(module, plain, args, kwargs)[0])[None])
        finally:
            again.discard(module)

    return hook
