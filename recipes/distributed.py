"""One run on several processes that torchrun started: who is who, and what they have to agree on.

With one process everything here does nothing.
"""

from __future__ import annotations

import gc
import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ap import Masks

# A rank that dies is noticed at once, by its connections and by torchrun; this is for one that hangs. Loading data and
# compiling may take ranks very different times.
TIMEOUT = timedelta(minutes=30)
_T = TypeVar("_T")


class Disagreement(RuntimeError):
    """Ranks have pruned differently; the message names rank and layer."""


class Silent:
    """Takes any call and does nothing: the writer of the ranks that write nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def launched() -> bool:
    """Whether torchrun started this process together with others."""
    return dist.is_available() and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main() -> bool:
    """Whether this is the process that speaks and writes; also before they are connected."""
    return not launched() or int(os.environ["RANK"]) == 0


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _joined() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _joined() else 1


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def local_device(name: str) -> str:
    """The name of the device that this process has for itself.

    Raises:
        ValueError: the name is one GPU's, which all processes would share, or there are fewer GPUs than processes.
    """
    if not launched():
        return name
    if name.startswith("cuda:"):
        raise ValueError(
            f"--device {name} under torchrun: all processes would use this GPU; say cuda, and each has one"
        )
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    mine, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if mine >= there:
        raise ValueError(f"process {mine} has no GPU for itself, there are {there}: --nproc-per-node {there}")
    return f"cuda:{mine}"


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes are connected, by gloo, and their GPUs by NCCL as well.

    They can be only once: what torchrun has them meet by does not forget where they were found the first time.
    """
    if not launched() or _joined():
        yield
        return
    # Its functions take the process group as default arguments, when they are imported. DistributedDataParallel imports
    # them: after the group is there they would keep it, and gloo's threads, which abort a process that exits over them.
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        gc.collect()  # wrapped models, which hold the group, are in cycles of references
        # Before torch 2.8 the group's end waits for gloo's threads while it keeps Python from them, which they need to
        # let go of the last result.
        time.sleep(0.2)
        dist.destroy_process_group()


def share(value: _T) -> _T:
    """Rank 0's value, on every rank."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def on_main(function: Callable[[], _T]) -> _T:
    """What the function returns on rank 0, or the error that it raises there, on every rank."""
    if size() == 1:
        return function()
    value: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            value = function()
        except Exception as raised:
            error = raised
    value, error = share((value, error))
    if error is not None:
        raise error
    return value


def gather(value: _T) -> list[_T]:
    """Every rank's value, on every rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if size() == 1:
        return flag
    count = torch.tensor(int(flag))
    dist.all_reduce(count)
    return bool(count)


def sum_(*tensors: Tensor) -> None:
    """Sums each tensor over the ranks, in place."""
    if size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def mean_(tensor: Tensor) -> Tensor:
    """The mean over the ranks, in place."""
    if size() > 1:
        dist.all_reduce(tensor)
        tensor /= size()
    return tensor


def share_buffers(model: nn.Module) -> None:
    """Running statistics as rank 0 has them, on every rank; DistributedDataParallel does it before each pass."""
    if size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def wrapped(forward: nn.Module, device: torch.device) -> nn.Module:
    """What averages its gradients over the ranks in the backward pass."""
    if size() == 1:
        return forward
    return DistributedDataParallel(forward, device_ids=[device.index] if device.type == "cuda" else None)


def my_share(count: int) -> slice:
    """This rank's part of `count` positions, a multiple of the number of ranks."""
    each = count // size()
    return slice(rank() * each, (rank() + 1) * each)


def check_masks(masks: Masks, when: str) -> None:
    """That all ranks have the same masks.

    Raises:
        Disagreement: on every rank, with the first rank and layer that differ from rank 0's.
    """
    if size() == 1:
        return
    sums: list[Mapping[str, int]] = gather(masks.state_dict()["crc32"])
    for number, its in enumerate(sums):
        odd = [name for name in its if its[name] != sums[0][name]]
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise Disagreement(
                f"rank {number} has another mask than rank 0 in {odd[0]}{more}, {when}: a pruner whose scores differ "
                "between ranks must reduce them, see ap.ranks.reduce_over_ranks"
            )
