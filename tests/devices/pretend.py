"""A GPU that is only pretended: tensors that say they are on `cuda:0`, with their numbers in the CPU's memory.

What CUDA would refuse is refused: operations on tensors of both devices, NumPy's view of a tensor there, a generator of
the CPU for numbers there. Inside of `never_waiting()` whatever a host would wait for the device for, or could not be
captured in a graph, is refused as well. So the code paths of a device run, with real numbers, where there is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.equal, aten._unique2}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_state = {"waiting": True, "capturing": False}


class MixedDevices(RuntimeError):
    """As CUDA's "Expected all tensors to be on the same device"."""


class Waited(RuntimeError):
    """The host would have waited, or a graph could not hold this."""


@contextlib.contextmanager
def never_waiting(capturing: bool = False) -> Iterator[None]:
    """Inside, the host must not wait; with `capturing` as torch would be in the middle of a graph's capture."""
    before = dict(_state)
    _state.update(waiting=False, capturing=capturing)
    try:
        yield
    finally:
        _state.update(before)


def _wait(what: object) -> None:
    if not _state["waiting"]:
        raise Waited(str(what))


class OnGPU(Tensor):
    """A tensor there; `elem` holds its numbers."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> OnGPU:
        return Tensor._make_wrapper_subclass(
            cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype
        )

    def __init__(self, elem: Tensor) -> None:
        self.elem = elem.detach()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        _wait("tolist")
        return self.elem.tolist()

    def record_stream(self, stream: Any) -> None:
        """Nothing runs beside anything here."""

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({self.elem})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = OnGPU(self.elem.clone())
        copied = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file's tensors are read back to the CPU
        return self.elem.__reduce_ex__(protocol)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        value = value if isinstance(value, OnGPU) else OnGPU(value)
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.elem = value.elem

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check(func, args, kwargs)
        own = {id(x.elem): x for x in tree_leaves((args, kwargs)) if isinstance(x, OnGPU)}
        plain = {id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not isinstance(x, OnGPU)}
        args, kwargs = tree_map(lambda x: x.elem if isinstance(x, OnGPU) else x, (args, kwargs))
        with torch.no_grad():
            result = func(*args, **kwargs)

        def labelled(x: Any) -> Any:
            known = own.get(id(x))
            return x if not isinstance(x, Tensor) or id(x) in plain else OnGPU(x) if known is None else known

        return tree_map(labelled, result)


def _check(func: Any, args: Any, kwargs: Any) -> None:
    packet = func.overloadpacket
    if packet in READS:
        _wait(func)
    if isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
    strangers = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not isinstance(x, OnGPU)]
    if packet in INDEXING:
        if any(x.dtype == torch.bool for x in args[1] if x is not None):
            _wait(func)
        if strangers:
            _wait(func)
        strangers = [] if isinstance(args[0], OnGPU) else strangers  # numbers of places may come from the CPU
        strangers += [x for x in args[2:3] if isinstance(x, Tensor) and not isinstance(x, OnGPU) and x.dim()]
    elif packet is aten.copy_:
        if strangers:
            _wait(func)
        return
    written = args[0] if packet.__name__.endswith("_") and args else None
    if any(x.dim() or x is written for x in strangers):
        shapes = [tuple(x.shape) for x in strangers]
        raise MixedDevices(f"{func}: tensors of shape {shapes} are on the CPU, others on cuda:0")


def on_gpu(x: Tensor) -> Tensor:
    """The same numbers there."""
    if isinstance(x, OnGPU):
        return x
    return OnGPU(x.detach().clone()).requires_grad_(x.requires_grad)


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Pretend(TorchFunctionMode):
    """Inside of it, `device="cuda"` and `.to("cuda")` make such tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, *args, **kwargs)
        if func is torch.unravel_index and isinstance(args[0], OnGPU):  # makes tensors of its own
            return tuple(on_gpu(part) for part in func(args[0].elem, *args[1:], **kwargs))
        kwargs.pop("pin_memory", None)
        if "device" not in kwargs:
            return func(*args, **kwargs)
        there = kwargs["device"] is not None
        gpu = _is_gpu(kwargs.pop("device"))
        if gpu and kwargs.get("generator") is not None:
            raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
        if gpu and func in (torch.tensor, torch.as_tensor):
            _wait(func)
        made = func(*args, **kwargs)
        if gpu:
            return on_gpu(made)
        return made.elem if there and isinstance(made, OnGPU) else made

    @staticmethod
    def _moved(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        target = {Tensor.cpu: torch.device("cpu"), Tensor.cuda: GPU}.get(func, x.device)
        waits, kept = not kwargs.pop("non_blocking", False), {"memory_format": kwargs.pop("memory_format", None)}
        for arg in (*args, *kwargs.values()):  # what follows a dtype, non_blocking and copy, says nothing about devices
            if isinstance(arg, (torch.device, str)):
                target = torch.device(arg)
            elif isinstance(arg, Tensor):
                target, kept["dtype"] = arg.device, arg.dtype
            elif isinstance(arg, torch.dtype):
                kept["dtype"] = arg
            elif isinstance(arg, torch.memory_format):
                kept["memory_format"] = arg
            elif arg is True and "copy" in kwargs:
                kept["copy"] = True
        if x.device.type != target.type:
            if waits:
                _wait(func)
            x = on_gpu(x) if target.type == "cuda" else x.elem.clone()  # type: ignore[attr-defined]
        kept = {key: value for key, value in kept.items() if value is not None}
        return x.to(**kept) if kept else x


_group = torch._C._group_tensors_by_device_and_dtype


def _grouped(lists: Any, with_indices: bool = False) -> Any:
    """Where C++ looks at the device: groups by what it is pretended to be."""
    return {
        (next(x.device for x in first[0] if x is not None), dtype): (first, indices)
        for (_, dtype), (first, indices) in _group(lists, with_indices).items()
    }


class _Stream:
    device = torch.device("cuda", 0)

    def wait_stream(self, other: Any) -> None:
        """Nothing runs beside anything here."""


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tests of this folder run on it."""
    cuda = torch.cuda
    monkeypatch.setattr(torch._C, "DisableTorchFunction", contextlib.nullcontext)  # the mode must see every call
    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", _grouped)
    monkeypatch.setattr(cuda, "mem_get_info", lambda device=None: (2**40, 2**40))
    monkeypatch.setattr(cuda, "get_rng_state", lambda device=None: torch.get_rng_state())
    monkeypatch.setattr(cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state))
    monkeypatch.setattr(cuda, "Stream", lambda device=None: _Stream())
    default = _Stream()
    monkeypatch.setattr(cuda, "current_stream", lambda device=None: default)
    monkeypatch.setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(cuda, "is_current_stream_capturing", lambda: _state["capturing"])
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Pretend():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
