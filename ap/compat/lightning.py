"""Lightning callbacks: AP's cycles, and dead-neuron rates through the Trainer's own loggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"ap.compat.lightning needs lightning ({error.name} is missing): "
        "pip install 'activate-while-pruning[lightning]'",
        name=error.name,
    ) from error

from ap.compat.called import CalledModules
from ap.compat.loggers import MetricsWriter
from ap.dnr import DNRMonitor
from ap.plugin import AP


class DNRCallback(Callback):
    """Logs each layer's dead-neuron rate through the Trainer's loggers, once an epoch.

    What it monitors is the outermost module that the first training step calls: the LightningModule itself, or the
    network in it. `monitor` is the `DNRMonitor`, from the first step on.

    Args:
        every: observe the first pass and then every so many.
    """

    def __init__(self, every: int = 50) -> None:
        self.every = every
        self.monitor: DNRMonitor | None = None
        self._called = CalledModules()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for the first step."""
        if self.monitor is None:
            self._called.start()
        else:
            self.monitor.attach()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Attaches after the first step."""
        if self.monitor is None:
            self._called.stop()
            found = self._called.outermost({id(p) for p in pl_module.parameters()})
            if not found:
                raise ValueError(f"the first training step of {type(pl_module).__name__} called none of its modules")
            self.monitor = DNRMonitor(found[0], every=self.every).attach()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the epoch's passes, validation included."""
        if self.monitor is not None and trainer.is_global_zero:
            writer = MetricsWriter(*trainer.loggers)
            self.monitor.log(writer, trainer.global_step)
            writer.flush()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the model."""
        self._called.stop()
        if self.monitor is not None:
            self.monitor.detach()


class APCallback(Callback):
    """AP's cycles in a Trainer: every so many epochs the pruner's part goes, then AP's.

    Args:
        pruner: `pruner(model, share)` zeroes or masks that share of what is alive; None where another callback prunes,
            as Lightning's ModelPruning does: put that one first in the list, with `amount=callback.amount_for` and
            `apply_pruning=callback.prunes_at`.
        epochs: how many a cycle lasts.
        cycles: how many there are; afterwards training goes on with the last masks.
        amount: p, the share of what is alive that a cycle removes, AP's part included.
        rate, criterion, where: see `ap.AP`.
    """

    def __init__(
        self,
        pruner: Callable[[nn.Module, float], Any] | None = None,
        *,
        epochs: int = 1,
        cycles: int = 5,
        amount: float = 0.2,
        rate: float = 0.02,
        criterion: str = "least-moved-negative",
        where: str = "all",
    ) -> None:
        if epochs < 1 or cycles < 1:
            raise ValueError(f"epochs and cycles must be at least 1, not {epochs} and {cycles}")
        self.pruner, self.epochs, self.cycles, self.amount = pruner, epochs, cycles, amount
        self._options: dict[str, Any] = {"rate": rate, "criterion": criterion, "where": where}
        self.plugin: AP | None = None
        self.share = 0.0
        self._cycle: Any = None
        self._state: dict[str, Any] | None = None

    def prunes_at(self, epoch: int) -> bool:
        """Whether a cycle ends with this epoch (for ModelPruning's `apply_pruning`)."""
        return (epoch + 1) % self.epochs == 0 and epoch < self.epochs * self.cycles

    def amount_for(self, epoch: int) -> float:
        """The pruner's share at the end of this epoch (for ModelPruning's `amount`)."""
        return self.share if self.prunes_at(epoch) else 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a cycle."""
        if self.plugin is None:
            self.plugin = AP(pl_module, **self._options)
            if self._state is not None:
                self.plugin.masks.load_state_dict(self._state["masks"])
                # ModelPruning leaves its masks out of checkpoints, and without them counts dead weights as its share.
                if self.pruner is None and self.plugin.masks.alive < self.plugin.masks.total:
                    self.plugin.masks.to_torch_prune()
        if self._cycle is None and trainer.current_epoch < self.epochs * self.cycles:
            self._cycle = self.plugin.cycle(self.amount)
            self.share = self._cycle.__enter__()
            if self._state is not None and self._state["plugin"] is not None:
                self.plugin.load_state_dict(self._state["plugin"])
        elif self._cycle is None and self._state is not None:
            self.plugin.mark_start()  # the cycles are over: what is dead stays dead
        self._state = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a cycle: the pruner, then AP."""
        if self._cycle is None or not self.prunes_at(trainer.current_epoch):
            return
        if self.pruner is not None:
            self.pruner(pl_module, self.share)
        cycle, self._cycle = self._cycle, None
        cycle.__exit__(None, None, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the model; a cycle under way activates nothing, and goes on when training does."""
        self._state = self.state_dict() or None
        if self._cycle is not None:
            self._cycle.gen.close()
            self._cycle = None
        if self.plugin is not None:
            self.plugin.detach()

    def state_dict(self) -> dict[str, Any]:
        """The masks, and where the cycle under way started; Lightning puts it into its checkpoints."""
        if self._state is not None:  # not training now: as training ended, or will begin
            return self._state
        if self.plugin is None:
            return {}
        start = self.plugin.state_dict() if self._cycle is not None else None
        return {"schema": 1, "masks": self.plugin.masks.state_dict(), "plugin": start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them over when training starts."""
        self._state = state_dict or None
