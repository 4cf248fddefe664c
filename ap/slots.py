"""Where a prunable weight lives in its model, its mask, and the hooks that keep what is dead at zero."""

from __future__ import annotations

import copy
import fnmatch
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # as torch.compiler.disable, but the compiler is not imported until needed
from torch.nn.modules.conv import _ConvNd
from torch.optim.optimizer import Optimizer

from ap.names import close_names, named_modules
from ap.warn import warn

Filter = str | Iterable[str] | Callable[[str, nn.Module], bool]
_LARGE = 1 << 16  # elements from which on NumPy's speed is worth its calls, after every step
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Handle(Protocol):
    """What a hook's registration returns."""

    def remove(self) -> None:
        """Removes the hook."""


class Kept(NamedTuple):
    """What is left of a parameter whose layer was made smaller.

    Attributes:
        shape: the old shape.
        rows: which elements of axis 0 are left, int64.
        columns: which of axis 1; None for all of them.
    """

    shape: torch.Size
    rows: Tensor
    columns: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """What is left of a tensor of the old shape."""
        tensor = tensor.index_select(0, self.rows.to(tensor.device))
        return tensor if self.columns is None else tensor.index_select(1, self.columns.to(tensor.device))


class Slot:
    """One weight: where it is, and its mask. The module is held weakly, so that a hook never keeps a model alive."""

    _looked: tuple[Tensor, int, bool] | None = None  # a mask, its version, and whether all of it was alive

    def __init__(self, name: str, module: nn.Module, attribute: str) -> None:
        self.name = name
        self.attribute = attribute
        self._module = weakref.ref(module)
        self.mask = self._whole()
        self._multipliers: dict[tuple[torch.dtype, torch.device], tuple[Tensor, int]] = {}
        self.gone = 0  # how many weights were removed physically: these count as dead

    def _whole(self) -> Tensor:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be updated outside of it
            return torch.ones_like(self.parameter(), dtype=torch.bool, requires_grad=False)

    @property
    def total(self) -> int:
        """How many weights there were at first."""
        return self.mask.numel() + self.gone

    def module(self) -> nn.Module:
        """The layer."""
        module = self._module()
        if module is None:
            raise ReferenceError(
                f"{self.name}: the layer of this mask no longer exists; it was replaced, or its model is gone. New "
                "layers need new masks: Masks(model)"
            )
        return module

    def of_copy(self, memo: dict[int, Any]) -> Slot:
        """The slot of a model that was copied with `copy.deepcopy(model, memo)`."""
        slot = Slot.__new__(Slot)  # the copy may be half-made still: its parameters are not looked at
        slot.name, slot.attribute, slot.gone = self.name, self.attribute, self.gone
        slot._module = weakref.ref(copy.deepcopy(self.module(), memo))
        slot.mask, slot._multipliers = self.current_mask().clone(), {}
        return slot

    def find(self) -> nn.Parameter | None:
        """The parameter as it is now, or None when the layer or the parameter is gone."""
        module = self._module()
        if module is None:
            return None
        parameters = module._parameters
        parameter = parameters.get(self.attribute)
        return parameter if parameter is not None else parameters.get(self.attribute + "_orig")

    def parameter(self) -> nn.Parameter:
        """The parameter as it is now."""
        self.module()
        parameter = self.find()
        if parameter is None:
            raise ValueError(f"{self.name} is not a parameter any more (replaced by a parametrization?)")
        return parameter

    def torch_prune_mask(self) -> Tensor | None:
        """The buffer that torch.nn.utils.prune keeps for this weight, if it does."""
        module = self.module()
        if module._parameters.get(self.attribute + "_orig") is None:
            return None  # a buffer of that name is the layer's own
        return module._buffers.get(self.attribute + "_mask")

    def current_mask(self) -> Tensor:
        """The mask, on the device where the weight is now."""
        parameter = self.parameter()
        if parameter.shape != self.mask.shape:
            raise ValueError(
                f"{self.name} has shape {list(parameter.shape)} now, its mask {list(self.mask.shape)}: "
                "call masks.refresh() after changing a layer's shape"
            )
        if self.mask.device != parameter.device:
            self.mask = self.mask.to(parameter.device)
        return self.mask

    def follow(self, kept: Kept) -> None:
        """Takes the mask along to the smaller shape that the weight has now."""
        before = self.mask.numel()
        self.mask = kept.of(self.mask)
        self.gone += before - self.mask.numel()
        self._multipliers.clear()

    def refresh(self) -> bool:
        """Starts a whole mask where the weight has another shape now; returns whether it does."""
        parameter = self.parameter()
        if parameter.shape == self.mask.shape:
            return False
        self.gone = max(0, self.total - parameter.numel())
        self.mask = self._whole()
        self._multipliers.clear()
        return True

    def multiplier(self, like: Tensor, mask: Tensor) -> Tensor:
        """The current mask in dtype and strides of `like`; updated in place: a captured graph sees later prunings."""
        key = (like.dtype, like.device)
        cached, version = self._multipliers.get(key, (None, -1))
        if cached is None or not _same_layout(cached, like):
            cached = torch.empty_like(like, requires_grad=False).copy_(mask)
        elif version != mask._version:
            cached.copy_(mask)
        self._multipliers[key] = (cached, mask._version)
        return cached

    def all_alive(self) -> bool:
        """Whether no weight is dead; looked at once for each change of the mask."""
        mask = self.mask
        if self._looked is None or self._looked[0] is not mask or self._looked[1] != mask._version:
            self._looked = (mask, mask._version, bool(mask.all()))
        return self._looked[2]

    @torch.no_grad()
    def apply(self) -> None:
        """Zeroes what is dead, and tells everyone who multiplies by this mask."""
        parameter, mask = self.parameter(), self.current_mask()
        multiply_(parameter, mask)
        for cached, _ in self._multipliers.values():
            cached.copy_(mask)
        buffer = self.torch_prune_mask()
        if buffer is not None:
            buffer.mul_(mask)
            setattr(self.module(), self.attribute, parameter * buffer)  # as prune's own pre-forward hook does


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one shape lie in memory alike: the stride of an axis of length 1 says nothing.

    A 1 × 1 convolution's weight and its momentum differ in such strides in channels_last.
    """
    first, second = a.stride(), b.stride()
    return first == second or all(s == t for length, s, t in zip(a.shape, first, second, strict=True) if length != 1)


def _by_numpy(tensor: Tensor) -> bool:
    """Whether NumPy can do the work, faster."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
    return plain and tensor.dtype in (torch.float32, torch.float64)


def multiply_(tensor: Tensor, mask: Tensor) -> None:
    """tensor *= mask. NumPy multiplies floats by bools at the speed of memory, torch by way of a converted copy."""
    if _by_numpy(tensor):
        array = tensor.detach().numpy()
        np.multiply(array, mask.numpy(), out=array)
        torch.autograd.graph.increment_version(tensor)  # a graph that needs the old values must notice
    else:
        tensor.mul_(mask)


def zeros_of(tensor: Tensor) -> Tensor:
    """tensor == 0, as bools; NumPy compares three times as fast."""
    tensor = tensor.detach()
    if _by_numpy(tensor):
        return torch.from_numpy(np.asarray(np.equal(tensor.numpy(), 0)))
    return tensor == 0


class Handles:
    """Several handles as one."""

    def __init__(self, handles: list[Handle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


# A compiled optimizer step runs this eagerly, behind a graph break, instead of specialising on every weight and mask.
@_disable_dynamo
@torch.no_grad()
def enforce(slots: list[Slot], optimizer: Optimizer) -> bool:
    """After a step: one fused multiply zeroes the dead weights and their entries in the optimizer's state.

    Returns whether the optimizer holds any of these weights.
    """
    held = parameter_ids(optimizer)
    holds = False
    tensors: list[Tensor] = []
    multipliers: list[Tensor] = []
    for slot in slots:
        parameter = slot.find()
        if parameter is None or id(parameter) not in held:
            continue
        holds = True
        mask = slot.mask
        if mask.device != parameter.device or mask.shape != parameter.shape:
            mask = slot.current_mask()
        # A GPU multiplies by a whole mask as well: to look at it would wait for it, and freeze in a captured graph.
        if mask.is_cpu and slot.all_alive():
            continue
        shape, large = mask.shape, mask.is_cpu and mask.numel() >= _LARGE
        for value in (parameter, *optimizer.state.get(parameter, {}).values()):
            if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                continue
            if large and _by_numpy(value):
                multiply_(value, mask)  # reads a byte a weight instead of four, and needs no copy of the mask
            else:
                tensors.append(value)
                multipliers.append(slot.multiplier(value, mask))
    if tensors:
        torch._foreach_mul_(tensors, multipliers)
    return holds


def follow_optimizer(optimizer: Optimizer, kept: Mapping[nn.Parameter, Kept]) -> None:
    """Takes an optimizer's state along: momentum and moments element by element; state of other shapes starts anew."""
    for parameter, part in kept.items():
        state = optimizer.state.get(parameter, {})
        for key, value in list(state.items()):
            if isinstance(value, Tensor) and value.shape == part.shape:
                state[key] = part.of(value)
            elif isinstance(value, Tensor) and value.numel() > 1:  # sums over rows or columns that are no more
                optimizer.state.pop(parameter)
                break


def gradient_hook(slot: Slot) -> Callable[[Tensor], None]:
    """A hook that zeroes the dead weights' gradients once they are accumulated."""

    def zero_dead(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.mul_(slot.multiplier(parameter.grad, slot.current_mask()))

    return zero_dead


def parameter_ids(optimizer: Optimizer) -> set[int]:
    """Which parameters an optimizer steps."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def find_slots(model: nn.Module, include: Filter | None, exclude: Filter | None) -> list[Slot]:
    """The weights to prune, in module order, as `Masks` describes them."""
    candidates: dict[str, tuple[nn.Module, str]] = {}
    others: dict[str, tuple[nn.Module, str]] = {}
    first: dict[int, str] = {}  # the name that a parameter has already
    for prefix, module in named_modules(model):
        prunable = _weight_attributes(module)
        if _is_computed(module):
            warn(
                f"{prefix or type(module).__name__}: its weight is computed, by a parametrization, weight_norm or "
                "spectral_norm, and is left out"
            )
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            plain = attribute.removesuffix("_orig") if attribute + "_mask" not in module._buffers else attribute
            if f"{plain}_mask" not in module._buffers:
                plain = attribute
            name = f"{prefix}.{plain}" if prefix else plain
            if parameter.is_meta and plain in prunable:
                raise ValueError(f"{name} is on the meta device, without any values: give the model its weights first")
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                if plain in prunable:
                    raise ValueError(f"{name} is not initialised yet: run the model once on example data first")
                continue
            known = first.get(id(parameter))
            if known is None or (plain in prunable and known in others):  # an embedding's weight that is a layer's too
                others.pop(known or "", None)
                first.pop(id(parameter), None)  # its place is the layer's
                first[id(parameter)] = name
                (candidates if plain in prunable else others)[name] = (module, plain)
    names = list(candidates)
    if include is not None:
        chosen = _match(candidates, include, "include", extra=others)
        names = [name for name in first.values() if name in chosen]
    if exclude is not None:
        left_out = _match(candidates, exclude, "exclude", extra=others)
        names = [name for name in names if name not in left_out]
    everything = {**candidates, **others}
    return [Slot(name, *everything[name]) for name in names]


def _weight_attributes(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, (_ConvNd, nn.Linear, nn.Bilinear)):
        return ("weight",)
    return _ATTENTION if isinstance(module, nn.MultiheadAttention) else ()


def _is_computed(module: nn.Module) -> bool:
    """Whether a layer's weight is no parameter any more, so that zeros written into it would not last."""
    if not isinstance(module, (_ConvNd, nn.Linear, nn.Bilinear)):
        return bool(_weight_attributes(module)) and "parametrizations" in module._modules
    held = module._parameters
    pruned = held.get("weight_orig") is not None and "weight_mask" in module._buffers
    return held.get("weight") is None and not pruned


def _match(
    candidates: Mapping[str, tuple[nn.Module, str]],
    wanted: Filter,
    what: str,
    extra: Mapping[str, tuple[nn.Module, str]],
) -> set[str]:
    if callable(wanted):
        return {name for name, (module, _) in candidates.items() if wanted(name, module)}
    matched: set[str] = set()
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        hits = {
            name
            for name in candidates
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rpartition(".")[0], pattern)
        }
        if not hits and pattern in extra:
            hits = {pattern}
        if not hits:
            raise ValueError(f"{what}={pattern!r} matches no weight{close_names(pattern, [*candidates, *extra])}")
        matched |= hits
    return matched
