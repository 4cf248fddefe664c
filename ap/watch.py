"""`python -m ap watch train.py …`: any training script, unchanged, with its dead-neuron rates in TensorBoard.

The models that are trained are found at each optimizer's first step; a monitor observes them from their next pass on.
"""

from __future__ import annotations

import json
import os
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from ap.compat.called import CalledModules, stepped
from ap.compat.loggers import CSVWriter
from ap.dnr import MODES, DNRMonitor
from ap.steps import StepHandle, after_every_step

_SCHEMA = 1


@dataclass
class _Watched:
    """A model under observation. One of its optimizers, the leader, counts its training steps."""

    name: str
    monitor: DNRMonitor
    writer: Any
    leader: weakref.ref[Optimizer]
    step: int  # how many there were
    others: set[int] = field(default_factory=set)  # optimizers that stepped since the leader did

    def count(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer's step is a training step, and not the second half of one with two optimizers.

        A loop that makes a new optimizer leaves the old one behind: whoever steps twice without the leader takes over.
        """
        if self.leader() is not optimizer:
            if self.leader() is not None and id(optimizer) not in self.others:
                self.others.add(id(optimizer))
                return False
            self.leader = weakref.ref(optimizer)
        self.others.clear()
        self.step += 1
        return True

    def log(self) -> None:
        """Writes the window since the last one."""
        self.monitor.log(self.writer, self.step)


def _say(line: str) -> None:
    print(f"ap watch: {line}", file=sys.stderr, flush=True)


class Watcher:
    """Attaches monitors to whatever is trained in this process, from `start()` to `finish()`.

    Args:
        folder: where events and reports go, each model's in a new folder of its own there.
        every: a monitor observes the first pass and then every so many.
        log_every: optimizer steps between two logs; a last one comes at the end.
    """

    def __init__(self, folder: str | Path, every: int = 50, log_every: int = 200) -> None:
        for name, value in (("every", every), ("log_every", log_every)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.folder = Path(folder).absolute()
        self.every, self.log_every = every, log_every
        self.watched: list[_Watched] = []
        self._trained = False  # whether any model was, watched or not
        self._called = CalledModules()
        self._known: weakref.WeakKeyDictionary[Optimizer, list[_Watched]] = weakref.WeakKeyDictionary()
        # How many steps were made before the model was seen.
        self._missed: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._handle: StepHandle | None = None

    def start(self) -> None:
        """Waits for the first optimizer step."""
        self._called.start()
        self._handle = after_every_step(self._after_step)

    def finish(self) -> None:
        """Lets go of everything, writes the reports and prints them to stderr."""
        self._called.stop()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if not self._trained:
            _say(
                "nothing to report: no model was trained with a torch.optim optimizer in this process (processes that "
                "the script starts itself are not watched)"
            )
        for watched in self.watched:
            self._guard(lambda watched=watched: self._close(watched))  # type: ignore[misc]
        self.watched = []

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        watched = self._known.get(optimizer)
        if watched is None:
            self._guard(lambda: self._find(optimizer))
            return
        for one in watched:
            if one.count(optimizer) and one.step % self.log_every == 0:
                self._guard(one.log)

    def _guard(self, action: Callable[[], None]) -> None:
        """What fails here must not end the training that is watched."""
        try:
            action()
        except Exception as error:
            _say(f"{type(error).__name__}: {error}")

    def _find(self, optimizer: Optimizer) -> None:
        parameters = stepped(optimizer)
        held = [w for w in self.watched if any(id(p) in parameters for p in w.monitor.model.parameters())]
        if held:  # another optimizer for a model that is watched already
            self._known[optimizer] = held
            for watched in held:
                watched.count(optimizer)
            return
        models = self._called.outermost(parameters)
        if not models:  # its model was not called since: look again at the next step
            self._missed[optimizer] = self._missed.get(optimizer, 0) + 1
            self._called.start()
            return
        self._trained = True
        self._let_go()
        self._known[optimizer] = found = []
        for model in models:
            try:
                found.append(self._watch(model, optimizer))
            except (TypeError, ValueError, OSError) as error:
                _say(f"{type(model).__name__} is not watched: {error}")
        self._called.stop()

    def _watch(self, model: nn.Module, optimizer: Optimizer) -> _Watched:
        monitor = DNRMonitor(model, every=self.every).attach()
        try:
            folder = self._own_folder(model)
            writer = _writer(folder)
        except OSError:
            monitor.detach()
            raise
        name = folder.name
        watched = _Watched(name, monitor, writer, weakref.ref(optimizer), 1 + self._missed.pop(optimizer, 0))
        self.watched.append(watched)
        _say(f"watching {name}, writing to {folder}")
        return watched

    def _own_folder(self, model: nn.Module) -> Path:
        """A new folder, named after the model's class: two runs in one would be one curve with two beginnings."""
        core = model
        while len(core._modules) == 1 and next(iter(core._modules)) in ("module", "_orig_mod"):
            core = next(iter(core._modules.values())) or core
        name = base = type(core).__name__
        count = 1
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                (self.folder / name).mkdir()
                return self.folder / name
            except FileExistsError:
                count += 1
                name = f"{base}-{count}"

    def _let_go(self) -> None:
        """Reports on models that are trained no more, so that a script that trains many does not keep them all."""
        stepped_still = {id(one) for known in self._known.values() for one in known}
        over = [one for one in self.watched if id(one) not in stepped_still]
        self.watched = [one for one in self.watched if id(one) in stepped_still]
        for one in over:
            self._guard(lambda one=one: self._close(one))  # type: ignore[misc]

    def _close(self, watched: _Watched) -> None:
        watched.monitor.detach()
        try:
            watched.log()
            watched.monitor.report()
            reports = {mode: watched.monitor.report(mode) for mode in watched.monitor.observed()}
        except ValueError as error:
            _say(f"{watched.name}: {error}")
            return
        finally:
            watched.writer.close()
        training, evaluation = (reports[mode].to_dict() if mode in reports else None for mode in MODES)
        result = {
            "schema": _SCHEMA,
            "model": watched.name,
            "steps": watched.step,
            "report": training,
            "evaluation": evaluation,
        }
        path = self.folder / watched.name / "dnr.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(path)
        tables = "\n\n".join(map(str, reports.values()))
        _say(f"{watched.name} after {watched.step} steps\n{tables}")


def _writer(folder: Path) -> Any:
    """What is written is on the disk within a second, since a job may be killed at any time.

    Nothing waits for it: on a machine whose cores all compute, TensorBoard's thread gets its turn after milliseconds.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _say(f"TensorBoard is not installed, so scalars go to {folder / 'dnr.csv'}; pip install tensorboard")
        return CSVWriter(folder / "dnr.csv")
    return SummaryWriter(str(folder), flush_secs=1)


def default_folder(script: str) -> Path:
    """runs/<script>-<date>-<time>."""
    return Path("runs") / f"{Path(script).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def is_first_rank() -> bool:
    """Whether this process reports: rank 0, or the only one. torchrun tells by the environment."""
    return os.environ.get("RANK", "0") == "0"
