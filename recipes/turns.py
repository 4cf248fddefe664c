"""Several runs in one process, which take turns: on a GPU their steps then overlap.

The steps of a small network leave most of a GPU idle. Runs in processes of their own do not fill it, since without
NVIDIA's MPS a GPU switches between processes. Runs in one process that each have a stream do. Only one of them is in
Python at a time, and passes on its turn after each step that it has launched. Torch's random number generators belong
to the whole process; they are exchanged with the turn, so that each run, which seeds them, draws what it would alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Turns:
    """Who is next.

    Args:
        device: what the runs train on.

    Example:
        >>> turns, said = Turns(torch.device("cpu")), []
        >>> def count(name):
        ...     with turns.taken():
        ...         for step in range(2):
        ...             said.append(f"{name}{step}")
        ...             turns.pass_on()
        >>> with turns.taken():  # nobody begins before all are there
        ...     threads = [threading.Thread(target=count, args=(name,)) for name in "ab"]
        ...     for number, thread in enumerate(threads, 1):
        ...         thread.start()
        ...         while turns.waiting < number:
        ...             pass
        >>> for thread in threads:
        ...     thread.join()
        >>> said
        ['a0', 'b0', 'a1', 'b1']
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._guard = threading.Lock()
        self._taken = False
        self._queue: deque[threading.Semaphore] = deque()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._queue)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Waits for a turn; inside, it is this thread's, on a stream of its own, except while it is passed on."""
        with self._guard:
            mine = self._queued() if self._taken else None
            self._taken = True
        if mine is not None:
            mine.acquire()
        try:
            with self._stream():
                yield
        finally:
            with self._guard:
                if self._queue:
                    self._queue.popleft().release()
                else:
                    self._taken = False

    def pass_on(self) -> None:
        """Lets everybody who waits have a turn first; to be called by the one whose turn it is."""
        with self._guard:
            if not self._queue:
                return
            mine, following = self._queued(), self._queue.popleft()
        drawn = self._random()
        following.release()
        mine.acquire()
        self._draw_from(drawn)

    def _queued(self) -> threading.Semaphore:
        self._queue.append(threading.Semaphore(0))
        return self._queue[-1]

    def _stream(self) -> contextlib.AbstractContextManager[Any]:
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self._device))

    def _random(self) -> list[Tensor]:
        """The state of torch's generators; neither waits for the device."""
        on_gpu = self._device.type == "cuda"
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self._device)] if on_gpu else [])]

    def _draw_from(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self._device)
