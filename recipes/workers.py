"""Processes that do an experiment's runs: one run after the other each, or several that take turns."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from typing import Any

import torch

from recipes.config import Job
from recipes.engine import Diverged, Stopped
from recipes.one_run import Say
from recipes.turns import Turns

Do = Callable[[Job, Say, Callable[[], bool]], None]
_BROKEN: tuple[type[Exception], ...] = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()
_worker: dict[str, Any] = {}


class Flag:
    """Set once, and seen by the processes that it is given to as they start.

    `multiprocessing.Event` asks under a lock: a process that is killed as it asks never gives that back, and a signal's
    handler that sets it waits for ever where it has interrupted the one who asks.
    """

    def __init__(self, context: BaseContext) -> None:
        self._value = context.RawValue("b", 0)

    def is_set(self) -> bool:
        """Whether it is."""
        return bool(self._value.value)

    def set(self) -> None:
        """Sets it."""
        self._value.value = 1


def start_worker(stop: Flag, queue: Any, threads: int, parent: int) -> None:
    """What a process does first.

    Args:
        stop: set where runs are to save and stop.
        queue: takes what they say.
        threads: of the CPU, for each of its runs.
        parent: the process that it ends with.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent is told, and tells us
    torch.set_num_threads(threads)
    _worker.update(stop=stop, queue=queue)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    """Where the parent was killed, a worker must neither linger nor write behind the back of whoever resumes."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def work(do: Do, jobs: Sequence[Job], device: torch.device, side_by_side: int = 1) -> list[str]:
    """Does some runs, so many of them side by side, in turn; returns how each that was begun ended, where not well.

    Args:
        do: does a run, says what happens, and asks after each step whether to stop.
        jobs: the runs.
        device: what they train on.
        side_by_side: how many.
    """
    say, stopped = _worker["queue"].put, _worker["stop"].is_set
    if side_by_side == 1:
        return [text for job in jobs if (text := _outcome(do, job, say, stopped))]
    turns, left, failures = Turns(device), list(reversed(jobs)), list[str]()

    def asked() -> bool:
        turns.pass_on()
        return stopped()  # type: ignore[no-any-return]

    def one_after_the_other() -> None:
        while left and not stopped():
            if text := _outcome(do, left.pop(), say, asked):
                failures.append(text)

    turns.share(one_after_the_other, min(side_by_side, len(jobs)))
    return failures


def _outcome(do: Do, job: Job, say: Say, stopped: Callable[[], bool]) -> str:
    """Why a run failed, if it did; all that it ends with is said."""
    try:
        do(job, say, stopped)
    except Stopped:
        say({"event": "stopped", "job": job.name})
        return ""
    except _BROKEN:  # nothing that is run on this GPU by this process works any more
        raise
    except (Diverged, FloatingPointError, ValueError, OSError) as error:
        why = str(error)
    except torch.OutOfMemoryError as error:
        why = f"{str(error).splitlines()[0]} Fewer --workers need less, and so does a smaller --batch-size"
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    else:
        say({"event": "done", "job": job.name})
        return ""
    finally:
        gc.collect()  # models are in cycles of references, and the next run needs their memory
    say({"event": "failed", "job": job.name, "why": why})
    return f"{job.name}: {why}"
