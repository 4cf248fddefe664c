"""Element-wise functions that keep little for the backward pass and run fast without a compiler.  [ours]

A rule has the same function twice. *Plain*: in ordinary differentiable operations, which is what a compiler fuses and
what torch.func, forward-mode derivatives and derivatives of derivatives take apart. *Lean*: a forward and a backward
kernel in closed form, for everyday eager training, which keep x alone.

On a CPU the kernels run block by block: intermediate results then stay in the cache, and no memory is mapped for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

Number = float | Tensor
_BLOCK = 2**17
"""Elements a thread: half a MiB in float32, so that a few of them fit a core's caches and Python's share is small."""


class Rule(NamedTuple):
    """One function of x and parameters, each a number or a tensor that broadcasts to x's shape.

    Attributes:
        plain: (x, *parameters) → y, in differentiable operations.
        forward: the same, fast; called without a graph.
        backward: (grad, x, *parameters, needs) → the gradients of x and of each parameter that `needs` asks for,
            else None; those of parameters may be in float32.
    """

    plain: Callable[..., Tensor]
    forward: Callable[..., Tensor]
    backward: Callable[..., Sequence[Tensor | None]]


def is_everyday() -> bool:
    """Whether operations run one by one and nothing but autograd's backward pass watches them."""
    return not torch.compiler.is_compiling() and is_only_differentiated()


def is_only_differentiated() -> bool:
    """Whether no transform and no forward-mode derivative takes the operations apart, and nothing records them."""
    return not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing())


def call(rule: Rule, x: Tensor, *parameters: Number) -> Tensor:
    """The function's value; lean wherever that can be."""
    fits = x.is_floating_point() and all(
        not isinstance(p, Tensor) or torch.broadcast_shapes(x.shape, p.shape) == x.shape for p in parameters
    )
    if not fits or not is_everyday():
        return rule.plain(x, *parameters)
    return _Lean.apply(rule, x, *parameters)  # type: ignore[no-any-return]


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(rule: Rule, x: Tensor, *parameters: Number) -> Tensor:
        return rule.forward(x, *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rule, *values = inputs
        ctx.rule = rule
        ctx.numbers = [None if isinstance(value, Tensor) else value for value in values]
        ctx.save_for_backward(*(value for value in values if isinstance(value, Tensor)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tensors = iter(ctx.saved_tensors)
        values = [next(tensors) if number is None else number for number in ctx.numbers]
        needs = ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            found = zip(ctx.rule.backward(grad, *values, needs), values, strict=True)
            return None, *(None if result is None else result.to(value.dtype) for result, value in found)
        # The gradient is to be differentiated again: take it from the plain form, whose graph goes on.
        wanted = [value for value, need in zip(values, needs, strict=True) if need]
        again = iter(torch.autograd.grad(ctx.rule.plain(*values), wanted, grad, create_graph=True))
        return None, *(next(again) if need else None for need in needs)


def number(parameter: Number) -> Number:
    """A shared parameter as a float where reading it costs nothing, which is on a CPU."""
    plain = isinstance(parameter, Tensor) and parameter.numel() == 1 and is_plain_cpu(parameter)
    return float(parameter) if plain else parameter


def blocks(tensors: Sequence[Tensor], *parameters: Number) -> Iterator[tuple[Tensor, ...]]:
    """The same parts of tensors of one shape, together all of them: on a CPU so small that they stay in the cache."""
    first = tensors[0]
    size = _BLOCK * torch.get_num_threads()
    if first.numel() <= size or not all(map(is_plain_cpu, tensors)):
        yield tuple(tensors)
        return
    varying = [p for p in parameters if isinstance(p, Tensor) and p.numel() > 1]
    if not varying and all(tensor.is_contiguous() for tensor in tensors):
        tensors = [tensor.view(-1) for tensor in tensors]
    elif not varying and first.dim() == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors):
        tensors = [tensor.permute(0, 2, 3, 1).view(-1) for tensor in tensors]
    elif any(p.dim() == first.dim() and p.shape[0] > 1 for p in varying):
        yield tuple(tensors)
        return
    rows = tensors[0].shape[0]
    step = max(1, size * rows // first.numel())
    for start in range(0, rows, step):
        yield tuple(tensor[start : start + step] for tensor in tensors)


def is_plain_cpu(tensor: Tensor) -> bool:
    """Whether NumPy may look at it, and its operations wait for nothing."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"


def is_finite(x: Tensor) -> bool:
    """False where x holds an infinity or NaN, or its sum is beyond its type; waits for the device."""
    return math.isfinite(float(x.sum()))


def inner(a: Tensor, b: Tensor, parameter: Tensor) -> Tensor:
    """Σ a·b over all that shares one value of the parameter, in the parameter's shape."""
    if parameter.numel() == 1:
        return torch.dot(a.reshape(-1), b.reshape(-1)).reshape(parameter.shape)
    return (a * b).sum_to_size(parameter.shape)
