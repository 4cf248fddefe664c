"""Counting, exactly and cheaply, for how many inputs each unit was alive.  [ours]

One integer per unit is all that is kept; everything in a report derives from it, and it adds up across batches, windows
and ranks. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ap.activations.ranges import DeadRange

_LANE = 255  # the most that one byte of a sum can hold
_INT32_MAX = 2**31 - 1


def count_over_batch(mask: Tensor) -> Tensor:
    """Sums a bool tensor [N, ...] over its batch axis: integers [...], uint8 where N ≤ 255, else int32.

    The bytes of the mask are added eight at a time as int64: no byte can carry into its neighbour within 255 rows.
    That reads one byte an element, where a sum of bools converts each to an integer first.
    """
    if torch.compiler.is_compiling():  # a compiler fuses the plain sum with what makes the mask
        return mask.to(torch.int32).sum(0, dtype=torch.int32)
    if mask.dim() == 4 and mask.stride(1) == 1 and not mask.is_contiguous():  # channels last
        return count_over_batch(mask.permute(0, 2, 3, 1)).permute(2, 0, 1)
    shape = mask.shape
    if not shape.numel():
        return mask.sum(0, dtype=torch.int32)
    if not mask.is_contiguous():
        mask = mask.contiguous()
    lane = _lane(shape[-1]) if len(shape) > 1 else None
    if lane is None:
        lane = _lane(shape[1:].numel())
        if lane is None:
            return mask.sum(0, dtype=torch.int32)
        mask = mask.view(shape[0], -1)
    rows = mask.view(lane)
    if shape[0] <= _LANE:
        return rows.sum(0, dtype=lane).view(torch.uint8).view(shape[1:])
    parts = (rows[i : i + _LANE].sum(0, dtype=lane).view(torch.uint8) for i in range(0, shape[0], _LANE))
    total = next(parts).to(torch.int32)
    for part in parts:
        total.add_(part)
    return total.view(shape[1:])


def _lane(size: int) -> torch.dtype | None:
    return torch.int64 if size % 8 == 0 else torch.int32 if size % 4 == 0 else None


def count_nonzero_over_batch(output: Tensor) -> Tensor:
    """For how many inputs of [N, ...] each unit is not 0 (NaN is not 0): integers [...]."""
    if not torch.compiler.is_compiling():
        return count_over_batch(output.to(torch.bool))  # several times faster than comparing
    if output.device.type == "cpu":
        return torch.ops.ap.count_nonzero_over_batch(output)
    return count_over_batch(output != 0)


# One node of a compiled graph: compiled for a CPU, a sum over the batch is not vectorised, and nor are stores of bools.
# It takes any layout, so that none has to be made for it.
torch.library.define("ap::count_nonzero_over_batch", "(Tensor output) -> Tensor", tags=torch.Tag.flexible_layout)


@torch.library.impl("ap::count_nonzero_over_batch", "CompositeExplicitAutograd")
def _opaque_count(output: Tensor) -> Tensor:
    """The eager count."""
    return count_over_batch(output.to(torch.bool)).to(torch.int32).contiguous()


@torch.library.register_fake("ap::count_nonzero_over_batch")
def _(output: Tensor) -> Tensor:
    return output.new_empty(output.shape[1:], dtype=torch.int32)


def dead_mask(values: Tensor, interval: DeadRange, channel_axis: int) -> Tensor:
    """Which pre-activations [N, ...] lie in the closed interval. NaN lies in none."""
    compiling = torch.compiler.is_compiling()
    low, high = (_along(end, values, channel_axis) for end in interval)
    if not compiling and values.is_floating_point():
        low, high = _rounded(low, values.dtype, math.inf), _rounded(high, values.dtype, -math.inf)
    bounded = isinstance(low, Tensor) or low != -math.inf
    on_cpu = values.device.type == "cpu" and values.is_floating_point() and not compiling
    if on_cpu and not bounded and not isinstance(high, Tensor):
        # Comparing into floats and converting those is twice as fast there as comparing into bools.
        return torch.le(values, high, out=torch.empty_like(values)).to(torch.bool)
    mask = values <= high
    return mask.logical_and_(values >= low) if bounded else mask


@lru_cache(maxsize=1024)
def _rounded_number(end: float, dtype: torch.dtype, towards: float) -> float:
    nearest = torch.tensor(end, dtype=dtype)
    if (nearest.double() - end) * towards < 0:  # rounded to the other side
        nearest = torch.nextafter(nearest, torch.tensor(towards, dtype=dtype))
    return nearest.item()


def _rounded(end: float | Tensor, dtype: torch.dtype, towards: float) -> float | Tensor:
    """The end of the interval as the values' type can hold it, inwards: a comparison would round it to the nearest."""
    return end if isinstance(end, Tensor) or math.isinf(end) else _rounded_number(end, dtype, towards)


def _along(end: float | Tensor, values: Tensor, axis: int) -> float | Tensor:
    if not isinstance(end, Tensor):
        return end
    if end.numel() == 1:
        return end.reshape(())
    return end.to(values.device).reshape([-1 if i == axis % values.dim() else 1 for i in range(values.dim())])


class Counts:
    """For how many inputs each unit of one layer was alive.

    Attributes:
        alive: integers in the unit's shape; `inputs` minus this is how often a unit was dead.
        inputs: for how many inputs each unit was counted: the samples, times the positions where units are channels.
        samples: how many samples were seen (the sum of the batch sizes).
        axes: the axes of the value without its batch axis that `alive` has: all, until their sizes change.
    """

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be updated outside of it
            self.alive = torch.zeros(shape, dtype=torch.int32, device=device)
        self.inputs = 0
        self.samples = 0
        self.axes = tuple(range(len(shape)))
        self._shape = tuple(shape)  # the sizes of all axes before any was summed

    def clone(self) -> Counts:
        """An independent copy."""
        copy = Counts.of_form(self.form, self.alive.device)
        copy.alive, copy.inputs, copy.samples = self.alive.clone(), self.inputs, self.samples
        return copy

    @property
    def form(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes of all axes, and which of them are kept: what another rank needs to know to add to these."""
        return self._shape, self.axes

    @classmethod
    def of_form(cls, form: tuple[tuple[int, ...], tuple[int, ...]], device: torch.device) -> Counts:
        """Counts of nothing yet, in the form of others."""
        shape, axes = form
        counts = cls(torch.Size(shape[axis] for axis in axes), device)
        counts._shape, counts.axes = shape, axes
        return counts

    @property
    def unit(self) -> str:
        """What a unit is: "element" of the output, or "channel" where the number of positions changed."""
        return "element" if len(self.axes) == len(self._shape) else "channel"

    def add_batch(self, shape: torch.Size, hits: Tensor | None, batch: int, counted_dead: bool = False) -> None:
        """Adds one batch's counts.

        Args:
            shape: the unit's shape in this batch.
            hits: integers `[*shape]`: for how many inputs a unit was alive; None for all of them.
            batch: the number of inputs.
            counted_dead: `hits` says for how many a unit was dead.
        """
        if tuple(shape) != self._shape:
            self._reduce(_kept(self._shape, tuple(shape), self.axes))
        inputs = batch
        if self.unit == "channel":
            inputs *= shape.numel() // max(1, self.alive.numel())
            hits = None if hits is None else _sum_to(hits.to(torch.int64), self.axes)
        self._make_room(inputs)
        if hits is not None and hits.device != self.alive.device:  # the model was moved
            self.alive = self.alive.to(hits.device)
        if hits is None:
            self.alive.add_(inputs)
        elif counted_dead:
            self.alive.add_(inputs).sub_(hits)
        else:
            self.alive.add_(hits)
        self.inputs += inputs
        self.samples += batch

    def merge(self, other: Counts) -> None:
        """Adds other counts of the same layer: of another window, or another rank."""
        other = other.clone()
        axes = self.axes if self._shape == other._shape else _kept(self._shape, other._shape, self.axes)
        axes = tuple(axis for axis in axes if axis in other.axes)
        self._reduce(axes)
        other._reduce(axes)
        self._make_room(other.inputs)
        self.alive.add_(other.alive.to(self.alive.device))
        self.inputs += other.inputs
        self.samples += other.samples

    def _reduce(self, axes: tuple[int, ...]) -> None:
        """Sums over all but these axes: what was summed over becomes inputs."""
        if axes == self.axes:
            return
        before = self.alive.numel()
        self.alive = _sum_to(self.alive.to(torch.int64), tuple(self.axes.index(axis) for axis in axes))
        self.inputs *= before // max(1, self.alive.numel())
        self.axes = axes

    def _make_room(self, more: int) -> None:
        if self.alive.dtype == torch.int32 and self.inputs + more > _INT32_MAX:
            self.alive = self.alive.to(torch.int64)


def _sum_to(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    others = [axis for axis in range(values.dim()) if axis not in axes]
    return values.sum(others) if others else values


def _kept(first: tuple[int, ...], second: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Which axes still tell units apart when a value's shape changes: the channels'.

    Of [C, H, W] the first if its size stayed the same, else the last; of [T, F] the one whose size stayed the same.
    """
    if len(first) != len(second):
        return ()
    same = [axis for axis in axes if first[axis] == second[axis]]
    if len(first) > 2:
        same = [axis for axis in same if axis in (0, len(first) - 1)][:1]
    return tuple(same)
