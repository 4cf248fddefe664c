"""Physically removing what is dead, outputs unchanged.  [ours]"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune as torch_prune
from torch.utils._pytree import tree_leaves

from ap.channels import Channels, Cut
from ap.graph import trace
from ap.graph_trace import unwrap
from ap.names import refuse_meta, refuse_wrappers
from ap.slots import Kept


def compact(model: nn.Module, example_input: Any, check: bool = True) -> nn.Module:
    """A smaller copy of the model with the same outputs in evaluation mode.

    Removed are channels and hidden units that no longer act: those whose value is a constant that the layers reading
    them can do without (0, or anything that folds into the next bias: of a linear layer, or of a convolution without
    zero padding), and those that nobody reads. Weights alone decide, no masks are needed. What the graph does not let
    follow (attention's width, what LayerNorm reads, the inputs and outputs of the model, grouped convolutions that are
    not depthwise) keeps its size; every layer keeps at least one channel.

    Args:
        model: any module; it is not changed. Masks of torch.nn.utils.prune are made permanent in the copy.
        example_input: a tensor [N, …], or a tuple of the forward pass's arguments, on the model's device.
        check: run both models on `example_input` and compare.

    Returns:
        The copy, in the mode of the original.

    Raises:
        ValueError: the model is on the meta device.
        RuntimeError: the outputs differ, or the copy does not run: its code depends on a size that was changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[2:5].zero_()  # three units that put out a constant
        >>> compact(model, torch.zeros(1, 4))
        Sequential(
          (0): Linear(in_features=4, out_features=5, bias=True)
          (1): ReLU()
          (2): Linear(in_features=5, out_features=2, bias=True)
        )
    """
    refuse_wrappers(model)
    refuse_meta(model)
    model = unwrap(model)
    # What torch.nn.utils.prune computes is no leaf, which cannot be copied otherwise.
    computed = [x for m in model.modules() for x in vars(m).values() if isinstance(x, Tensor) and x.grad_fn is not None]
    small = copy.deepcopy(model, {id(x): x.detach().clone() for x in computed})
    for module in small.modules():
        for name in [key[: -len("_orig")] for key in module._parameters if key.endswith("_orig")]:
            if f"{name}_mask" in module._buffers:
                torch_prune.remove(module, name)
    channels = Channels(trace(small, example_input))
    for cut in channels.cuts(channels.removable()):
        shrink_(cut)
    if check:
        _check(model, small, example_input)
    return small


@dataclass(frozen=True)
class Comparison:
    """What compaction saved.

    Attributes:
        parameters: before and after.
        macs: multiplications with an addition in a forward pass of one sample, before and after.
        latency_s: median seconds of a forward pass of the example, before and after, in interleaved rounds.
    """

    parameters: tuple[int, int]
    macs: tuple[int, int]
    latency_s: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, by "before" and "after"."""
        return {key: dict(zip(("before", "after"), value, strict=True)) for key, value in vars(self).items()}

    def __str__(self) -> str:
        rows = [("", "before", "after", "after / before")]
        for label, (before, after), form in (
            ("parameters", self.parameters, ",d"),
            ("MACs per sample", self.macs, ",d"),
            ("latency, ms", (self.latency_s[0] * 1e3, self.latency_s[1] * 1e3), ",.2f"),
        ):
            rows.append((label, format(before, form), format(after, form), f"{after / before:.3f}" if before else "–"))
        return "\n".join(f"{a:<16}{b:>16}{c:>16}{d:>16}" for a, b, c, d in rows)


def compare(before: nn.Module, after: nn.Module, example_input: Any, rounds: int = 11) -> Comparison:
    """Parameters, MACs and measured latency of two models for the same input.

    Args:
        before, after: the models; their modes are restored afterwards.
        example_input: a tensor [N, …], or a tuple of the forward pass's arguments, on the models' device.
        rounds: how many timed passes each, alternating; the median counts.

    Example:
        >>> compare(nn.Linear(8, 4), nn.Linear(8, 2), torch.zeros(1, 8)).macs
        (32, 16)
    """
    for model in (before, after):
        refuse_wrappers(model)
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton where it is installed

    arguments = _arguments(example_input)
    models = (before, after)
    modes = [[(module, module.training) for module in model.modules()] for model in models]
    times: tuple[list[float], list[float]] = ([], [])
    macs = []
    samples = next((len(x) for x in arguments if isinstance(x, Tensor) and x.dim()), 1)
    try:
        with torch.no_grad():
            for model in models:
                model.eval()
                with FlopCounterMode(display=False) as counter:
                    model(*arguments)
                macs.append(counter.get_total_flops() // 2 // max(1, samples))
            for _ in range(rounds):
                for model, taken in zip(models, times, strict=True):
                    taken.append(_timed(model, arguments))
    finally:
        for saved in modes:
            for module, mode in saved:
                module.training = mode
    parameters = [sum(p.numel() for p in model.parameters()) for model in models]
    return Comparison(
        (parameters[0], parameters[1]),
        (macs[0], macs[1]),
        (statistics.median(times[0]), statistics.median(times[1])),
    )


def _timed(model: nn.Module, arguments: tuple[Any, ...]) -> float:
    def wait() -> None:
        for device in {x.device for x in arguments if isinstance(x, Tensor) and x.device.type == "cuda"}:
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    model(*arguments)
    wait()
    return time.perf_counter() - start


def _arguments(example_input: Any) -> tuple[Any, ...]:
    return tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,)


@torch.no_grad()
def shrink_(cut: Cut) -> dict[nn.Parameter, Kept]:
    """Takes the rows and columns out of one module, in place; parameters stay the same objects.

    Returns:
        What is left of each of its parameters.
    """
    module, rows, columns = cut.module, cut.rows, cut.columns
    kept: dict[nn.Parameter, Kept] = {}
    if not isinstance(module, (nn.Linear, _ConvNd)):
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None and value.shape == (cut.width,):
                _take(module, name, rows, None, kept)
        for attribute in ("num_features", "num_parameters"):
            if getattr(module, attribute, None) == cut.width:
                setattr(module, attribute, len(rows))
        return kept
    depthwise = isinstance(module, _ConvNd) and module.groups > 1
    _take(module, "weight", rows, None if depthwise else columns, kept)
    if module.bias is not None:
        _take(module, "bias", rows, None, kept)
    if cut.shift is not None:
        shift = cut.shift[rows].to(module.weight)
        if module.bias is None:
            module.bias = nn.Parameter(shift, requires_grad=module.weight.requires_grad)
        else:
            module.bias.data += shift
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        module.out_channels, module.in_channels = len(rows), len(columns)
        module.groups = len(columns) if depthwise else 1
    return kept


def _take(module: nn.Module, name: str, rows: Tensor, columns: Tensor | None, kept: dict[nn.Parameter, Kept]) -> None:
    """Leaves these rows and columns of a parameter (its gradient included) or buffer."""
    if name in module._buffers:
        buffer = module._buffers[name]
        assert buffer is not None
        module._buffers[name] = Kept(buffer.shape, rows, columns).of(buffer)
        return
    parameter = module._parameters[name]
    assert parameter is not None
    part = kept[parameter] = Kept(parameter.shape, rows, columns)
    gradient, parameter.grad = parameter.grad, None
    _resize(parameter, part.of(parameter.data))
    parameter.grad = None if gradient is None else part.of(gradient)


def _resize(parameter: nn.Parameter, value: Tensor) -> None:
    """Gives a parameter values of another shape."""
    # Autograd remembers a parameter's shape for as long as a graph refers to it, unless its type changes in between.
    parameter.data = torch.empty(0, dtype=torch.float64 if value.dtype != torch.float64 else torch.float32)
    parameter.data = value


def _check(model: nn.Module, small: nn.Module, example_input: Any) -> None:
    arguments = _arguments(example_input)
    outputs = []
    for candidate in (model, small):
        modes = [(module, module.training) for module in candidate.modules()]
        candidate.eval()
        try:
            with torch.no_grad():
                outputs.append([x for x in tree_leaves(candidate(*arguments)) if isinstance(x, Tensor)])
        except (RuntimeError, ValueError, AssertionError) as error:
            if candidate is model:
                raise
            raise RuntimeError(
                f"the compacted {type(model).__name__} does not run: {error}. Its code depends on a size that was "
                "changed; compact the part of it that does not"
            ) from error
        finally:
            for module, mode in modes:
                module.training = mode
    for before, after in zip(*outputs, strict=True):
        if not before.is_floating_point() or not before.numel():
            continue
        finite = before.isfinite() & after.isfinite()
        same = bool((before.isfinite() == after.isfinite()).all())
        scale = float(before[finite].abs().max()) if bool(finite.any()) else 0.0
        error_ = float((before - after)[finite].abs().max()) if bool(finite.any()) else 0.0
        # On CUDA convolutions may round to ten bits (TF32), each shape in its own way.
        step = 2e-5 if before.is_cuda and before.dtype == torch.float32 else torch.finfo(before.dtype).eps
        limit = 1e3 * step * max(1.0, scale)
        if not same or error_ > limit:
            raise RuntimeError(
                f"compacting changed the outputs of {type(model).__name__} by up to {error_:.3g} (allowed: {limit:.3g})"
            )


@torch.no_grad()
def fit_(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Loads a state whose layers are smaller than the model's: each layer takes on the saved shape, in place.

    For what `compact` or structured pruning made of a model of this architecture. Parameters that keep their place stay
    the same objects; biases that compaction added are made.

    Args:
        model: the architecture at its full size.
        state: its `state_dict()` at the smaller size, e.g. from safetensors.

    Raises:
        ValueError: the state is of another architecture; the first odd names are listed.

    Example:
        >>> small = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> fit_(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), small.state_dict())[0]
        Linear(in_features=4, out_features=5, bias=True)
    """
    own = model.state_dict()
    added = [name for name in state if name not in own]
    odd = [name for name in own if name not in state] + [n for n in added if not _can_have_bias(model, n)]
    for name in own.keys() & state.keys():
        given, held = state[name].shape, own[name].shape
        if len(given) != len(held) or any(a > b for a, b in zip(given, held, strict=True)):
            odd.append(name)
    if odd:
        raise ValueError(f"this state is of another architecture than {type(model).__name__}: {', '.join(odd[:5])}")
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, _ConvNd):
            weight = state[f"{prefix}weight"]
            multiple = module.out_channels // module.groups
            if not module.transposed and module.groups > 1 and weight.shape != module.weight.shape:
                module.groups = len(weight) // multiple
            along = (weight.shape[1], weight.shape[0]) if module.transposed else (weight.shape[0], weight.shape[1])
            module.out_channels = along[0] * (module.groups if module.transposed else 1)
            module.in_channels = along[1] * (1 if module.transposed else module.groups)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = state[f"{prefix}weight"].shape
        for name in [*module._parameters, *module._buffers]:
            value = state.get(f"{prefix}{name}")
            held = module._parameters.get(name) if name in module._parameters else module._buffers[name]
            if value is None or (held is not None and held.shape == value.shape):
                continue
            for attribute in ("num_features", "num_parameters"):
                if held is not None and held.shape == (getattr(module, attribute, None),):
                    setattr(module, attribute, len(value))
            like = held if held is not None else module._parameters["weight"]
            assert like is not None
            empty = torch.empty(value.shape, dtype=like.dtype, device=like.device)
            if name in module._buffers:
                module._buffers[name] = empty
            elif held is not None:
                _resize(held, empty)  # type: ignore[arg-type]
            else:
                module._parameters[name] = nn.Parameter(empty, requires_grad=like.requires_grad)
    model.load_state_dict(dict(state))
    return model


def _can_have_bias(model: nn.Module, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return attribute == "bias" and isinstance(module, (nn.Linear, _ConvNd))
