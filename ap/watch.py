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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ap.compat.called import CalledModules, stepped
from ap.compat.loggers import CSVWriter
from ap.dnr import DNRMonitor

_SCHEMA = 1


@dataclass
class _Watched:
    name: str
    monitor: DNRMonitor
    writer: Any
    first: int  # the id of the parameter that tells its optimizer
    step: int = 0


def _say(line: str) -> None:
    print(f"ap watch: {line}", file=sys.stderr, flush=True)


class Watcher:
    """Attaches monitors to whatever is trained in this process, from `start()` to `finish()`.

    Args:
        folder: where events and reports go; made when the first model is found.
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
        self._called = CalledModules()
        self._known: weakref.WeakKeyDictionary[Optimizer, list[_Watched]] = weakref.WeakKeyDictionary()
        self._handle: Any = None

    def start(self) -> None:
        """Waits for the first optimizer step."""
        self._called.start()
        self._handle = register_optimizer_step_post_hook(self._after_step)

    def finish(self) -> None:
        """Lets go of everything, writes the reports and prints them to stderr."""
        self._called.stop()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if not self.watched:
            _say("no model was trained with a torch.optim optimizer in this process: nothing to report")
        for watched in self.watched:
            self._close(watched)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        watched = self._known.get(optimizer)
        if watched is None:
            self._guard(lambda: self._find(optimizer))
            return
        for one in watched:
            one.step += 1
            if one.step % self.log_every == 0:
                self._guard(lambda one=one: one.monitor.log(one.writer, one.step))  # type: ignore[misc]

    def _guard(self, action: Callable[[], None]) -> None:
        """What fails here must not end the training that is watched."""
        try:
            action()
        except Exception as error:
            _say(f"{type(error).__name__}: {error}")

    def _find(self, optimizer: Optimizer) -> None:
        parameters = stepped(optimizer)
        held = [w for w in self.watched if any(id(p) in parameters for p in w.monitor.model.parameters())]
        if held:  # another optimizer for a model that is watched already, whose steps are counted by the first one
            alive = [w for known in self._known.values() for w in known]
            self._known[optimizer] = [w for w in held if not any(w is other for other in alive)]
            return
        models = self._called.outermost(parameters)
        if not models:  # its model was not called since: look again at the next step
            self._called.start()
            return
        self._known[optimizer] = found = []
        for model in models:
            try:
                found.append(self._watch(model))
            except (TypeError, ValueError) as error:
                _say(f"{type(model).__name__} is not watched: {error}")
        self._called.stop()

    def _watch(self, model: nn.Module) -> _Watched:
        monitor = DNRMonitor(model, every=self.every).attach()
        core = model
        while len(core._modules) == 1 and next(iter(core._modules)) in ("module", "_orig_mod"):
            core = next(iter(core._modules.values())) or core
        name = base = type(core).__name__
        count = 1
        while any(other.name == name for other in self.watched):
            count += 1
            name = f"{base}-{count}"
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        watched = _Watched(name, monitor, _writer(folder), id(next(model.parameters())), step=1)
        self.watched.append(watched)
        _say(f"watching {name}, writing to {folder}")
        return watched

    def _close(self, watched: _Watched) -> None:
        watched.monitor.detach()
        try:
            watched.monitor.log(watched.writer, watched.step)
            report = watched.monitor.report()
        except ValueError as error:
            _say(f"{watched.name}: {error}")
            return
        finally:
            watched.writer.close()
        result = {"schema": _SCHEMA, "model": watched.name, "steps": watched.step, "report": report.to_dict()}
        path = self.folder / watched.name / "dnr.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(path)
        _say(f"{watched.name} after {watched.step} steps\n{report}")


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _say(f"TensorBoard is not installed, so scalars go to {folder / 'dnr.csv'}; pip install tensorboard")
        return CSVWriter(folder / "dnr.csv")
    return SummaryWriter(str(folder))


def default_folder(script: str) -> Path:
    """runs/<script>-<date>-<time>."""
    return Path("runs") / f"{Path(script).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def is_first_rank() -> bool:
    """Whether this process reports: rank 0, or the only one. torchrun tells by the environment."""
    return os.environ.get("RANK", "0") == "0"
