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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

# Each run has a stream, one for captures and one for copies, and torch has 32 a device.
AT_MOST = 10


class Turns:
    """Who is next.

    Args:
        device: what the runs train on.

    Example:
        >>> turns, said = Turns(torch.device("cpu")), []
        >>> def count():
        ...     name = names.pop()
        ...     while turns.waiting < len(names):  # until all are there
        ...         pass
        ...     for step in range(2):
        ...         said.append(f"{name}{step}")
        ...         turns.pass_on()
        >>> names = ["b", "a"]
        >>> turns.share(count, 2)
        >>> said
        ['a0', 'b0', 'a1', 'b1']
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._guard = threading.Lock()
        self._taken = False
        self._queue: deque[threading.Semaphore] = deque()
        self._own = threading.local()

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
                self._draw_apart()
                yield
        finally:
            with self._guard:
                if self._queue:
                    self._queue.popleft().release()
                else:
                    self._taken = False

    def share(self, function: Callable[[], Any], count: int) -> None:
        """Calls the function in so many threads, which take turns; raises what one of them raised, after all ended."""

        def in_turn() -> None:
            with self.taken():
                function()

        with ThreadPoolExecutor(count, "turn") as pool:
            for call in [pool.submit(in_turn) for _ in range(count)]:
                call.result()

    def pass_on(self) -> None:
        """Lets everybody who waits have a turn first; to be called by the one whose turn it is."""
        with self._guard:
            if not self._queue:
                return
            mine, following = self._queued(), self._queue.popleft()
        drawn = torch.get_rng_state()
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

    def _draw_apart(self) -> None:
        """A state of the GPU's generator for this thread alone: a captured step draws from where that state is kept on
        the device, which the steps of two runs must not share."""
        if self._device.type == "cuda":
            self._own.state = self._generator().clone_state()
            self._generator().graphsafe_set_state(self._own.state)

    def _generator(self) -> torch.Generator:
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        return torch.cuda.default_generators[index]  # type: ignore[no-any-return]

    def _draw_from(self, state: Tensor) -> None:
        torch.set_rng_state(state)
        if self._device.type == "cuda":
            self._generator().graphsafe_set_state(self._own.state)
