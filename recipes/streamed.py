"""A data set that is larger than the device's memory: its batches are read from disk while the device computes.

What is read is the pack, where images lie decoded, so that threads which only copy bytes keep up with a GPU: nothing is
decoded twice, and memory holds no more than what the system caches of the file. Order and augmentation are those of
`Resident`, on the device too, so that the results are the same.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from recipes.data import ImageData, ImageSet
from recipes.resident import EVAL_BATCH, Plan, Resident

AHEAD = 4  # batches that are being read, or wait to be used; as many threads read them


def fits(data: ImageData, device: torch.device) -> bool:
    """Whether the images of a data set take less than half of the memory that is free on the device."""
    needed = sum(part.images.numel() for part in (data.train, data.val, data.test))
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return True  # a system that does not tell
    return 2 * needed < free


@functools.cache
def _copy_stream(stream: Any) -> Any:
    """One for copies beside a stream, for all that is copied there: torch has 32 a device, then gives some again."""
    return torch.cuda.Stream(stream.device)


class Streamed(Resident):
    """The same as `Resident`, reading ahead of use instead of keeping the images on the device.

    Args:
        images, data, device, options: see `Resident`.
        stride: by how many positions the parts asked for in turn are apart.
    """

    def __init__(
        self, images: ImageSet, data: ImageData, device: torch.device, *args: Any, stride: int = 0, **options: Any
    ) -> None:
        self._stride = stride
        self._plan: Plan | None = None
        self._read_ahead: dict[tuple[int, int], Future[None]] = {}
        self._buffers: dict[tuple[int, int], list[Tensor]] = {}
        self._pool = ThreadPoolExecutor(AHEAD, "reader")
        self._copying = _copy_stream(torch.cuda.current_stream(device)) if device.type == "cuda" else None
        super().__init__(images, data, device, *args, **options)

    def _hold(self, images: ImageSet) -> None:
        self.images, self.labels = images.images, images.labels  # mapped, not read; plans stay on the CPU with them

    def part(self, plan: Plan, start: int, stop: int) -> tuple[Tensor, ...]:
        """As `Resident.part`, with the images themselves, uint8 [C, H, W, n], and their labels for their numbers."""
        self._begin(plan, start, stop)
        self._read_ahead.pop((start, stop)).result()
        return self._to_device(self._buffers.pop((start, stop)))

    def _begin(self, plan: Plan, start: int, stop: int) -> None:
        """Has the parts read that are wanted now and next, and forgets those that no longer are."""
        stride = self._stride or stop - start
        wanted = [(start + i * stride, stop + i * stride) for i in range(AHEAD)]
        wanted = [key for key in wanted if key == (start, stop) or key[1] <= len(self)]
        stale = [key for key in self._read_ahead if plan is not self._plan or key not in wanted]
        for key in stale:
            self._read_ahead.pop(key).cancel()
            self._buffers.pop(key)
        self._plan = plan
        for key in wanted:
            if key not in self._read_ahead:
                self._buffers[key], copies = self._prepared(plan.part(*key))
                self._read_ahead[key] = self._pool.submit(self._copy, copies)

    def _prepared(self, part: tuple[Tensor, ...]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The part with room for its images, and what is to be copied where.

        Memory is taken here and not by the reading threads: taking pinned memory would break a graph's capture.
        """
        numbers = (0, len(part) // 2) if self.mixup else (0,)
        found, copies = [], []
        for place, tensor in enumerate(part):
            if place not in numbers:
                found.append(tensor)
                continue
            room = torch.empty((len(tensor), *self.images.shape[1:]), dtype=torch.uint8, pin_memory=self._pinned)
            copies.append((tensor, room))
            found += [room.permute(1, 2, 3, 0), self.labels[tensor]]
        return found, copies

    @property
    def _pinned(self) -> bool:
        return self.device.type == "cuda"

    def _copy(self, copies: list[tuple[Tensor, Tensor]]) -> None:
        for numbers, room in copies:
            torch.index_select(self.images, 0, numbers, out=room)

    def _to_device(self, part: list[Tensor]) -> tuple[Tensor, ...]:
        if self._copying is None:
            return tuple(tensor.to(self.device) for tensor in part)
        # Beside the steps that are still being computed, which the host is ahead of.
        with torch.cuda.stream(self._copying):
            moved = tuple(tensor.to(self.device, non_blocking=True) for tensor in part)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copying)
        for tensor in moved:
            tensor.record_stream(current)
        return moved

    def _augmented(self, pixels: Tensor, labels: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        images = self._laid_out(pixels.permute(3, 0, 1, 2))
        return self._drawn(images, torch.arange(len(images), device=self.device), *drawn), labels

    def plain(self, which: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Images without augmentation, and labels."""
        which = which.cpu() if isinstance(which, Tensor) else which
        pixels = self.images[which].to(self.device).permute(0, 2, 3, 1).contiguous()
        return self._normalised(pixels), self.labels[which].to(self.device)

    def batches(
        self, size: int = EVAL_BATCH, limit: int | None = None, every: int = 1, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Resident.batches`; the next one is read while one is used."""
        count = len(self) if limit is None else min(limit, len(self))
        parts = [slice(start, min(start + size, count)) for start in range(first * size, count, every * size)]
        reads: deque[Future[Tensor]] = deque()
        for number, part in enumerate(parts):
            for after in parts[number + len(reads) : number + 2]:
                reads.append(self._pool.submit(self._bytes, after))
            pixels = reads.popleft().result().to(self.device)
            yield self._normalised(pixels.permute(0, 2, 3, 1).contiguous()), self.labels[part].to(self.device)

    def _bytes(self, part: slice) -> Tensor:
        return self.images[part].clone()  # out of the mapped file
