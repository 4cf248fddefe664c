"""One training under way, from step to step.

Nothing is read back to the host in a step on a GPU except every `CHECK_EVERY` steps, to see whether the loss is still
finite.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ap import DNRMonitor, Masks
from recipes import distributed
from recipes.average import Average
from recipes.resident import derived_seed
from recipes.schedule import Schedule
from recipes.step import CapturedStep, Step

if TYPE_CHECKING:
    from recipes.engine import Engine

CHECK_EVERY = 50


class Diverged(FloatingPointError):
    """The loss is no longer a finite number; the message says at which step, in which layer, at which learning rate."""


class Stopped(Exception):
    """Training was asked to stop, and did, after a whole step."""


class Training:
    """One training under way: it can be saved after any step, and goes on to the same result.

    Args:
        engine: what it shares with other trainings.
        model: the model, prepared; trained in place.
        start_step: the step that its weights stand at.
        cycle: of the experiment, for the schedule.
        monitor: what counts dead neurons in its steps, attached to `engine.called(model)`.
        masks: of the weights, so that only gradients of living ones are clipped.
        phase: "train" or "retrain"; dropout and the like draw other numbers in each.
        also: gives the tensors that hooks of the optimizer's steps change in place, such as `AP.followed`.

    Attributes:
        step: how many steps have been made, those before `start_step` included.
        last_loss: the mean loss over the last whole epoch.
        rate_factor: what the schedule's learning rates are multiplied by.
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        start_step: int,
        cycle: int,
        monitor: DNRMonitor | None = None,
        masks: Masks | None = None,
        phase: str = "train",
        also: Callable[[], Sequence[Tensor]] = tuple,
    ) -> None:
        self.engine, self.model, self.masks = engine, model, masks
        self.schedule = Schedule.of(engine.config, engine.steps_per_epoch, cycle)
        self.step = start_step
        self.last_loss: float | None = None
        self.rate_factor = 1.0
        self.optimizer = engine.optimizer(model, self.schedule(start_step))
        self.seconds = 0.0
        self._loss_steps = 0
        self._start = start_step
        config = engine.config
        self._average = average = None if config.ema is None else Average(model, config.ema)
        self._make = (CapturedStep if engine.captured else Step)(
            model,
            distributed.wrapped(engine.called(model), engine.device),
            self.optimizer,
            engine.train_set.gather,
            engine.training_loss,
            engine.autocast,
            monitor,
            parts=config.accumulate,
            before=None if config.clip_norm is None else self._clip,
            after=None if self._average is None else self._average.update,
            also=lambda: [*also(), *([] if average is None else average.tensors)],
        )
        # Dropout and the like: the same draws in every arm, and in a training that is continued (see state_dict).
        self._seed = derived_seed(engine.seed, cycle, 3 if phase == "retrain" else 2)
        torch.manual_seed(derived_seed(self._seed, distributed.rank()) if distributed.rank() else self._seed)

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to."""
        return self.step // self.engine.steps_per_epoch

    @property
    def done(self) -> bool:
        """Whether all steps have been made."""
        return self.step >= self.schedule.total

    def run_epoch(self, after_step: Callable[[int], None]) -> float:
        """The rest of the current epoch; returns the mean loss over the steps of this epoch.

        Args:
            after_step: called after each step with the number of steps made; may raise `Stopped`.

        Raises:
            Diverged: the loss is not finite.
        """
        engine, size = self.engine, self.engine.config.batch_size
        on_cpu = engine.device.type == "cpu"
        plan = engine.train_set.epoch(engine.seed, self.epoch)
        mine = distributed.my_share(size)
        end = min((self.epoch + 1) * engine.steps_per_epoch, self.schedule.total)
        self.model.train()
        began = time.perf_counter()
        try:
            while self.step < end:
                place = self.step % engine.steps_per_epoch * size
                inputs = engine.train_set.part(plan, place + mine.start, place + mine.stop)
                rate = self.schedule(self.step) * self.rate_factor
                if not self._make(inputs, rate):
                    raise self._diverged(self.step, inputs, rate)
                self._loss_steps += 1
                self.step += 1
                if not on_cpu and (self.step % CHECK_EVERY == 0 or self.step == end) and int(self._make.bad) >= 0:
                    raise self._diverged(self._start + int(self._make.bad), inputs, rate)
                after_step(self.step)
            distributed.share_buffers(self.model)
            if not _all_finite(self.model):  # no later loss would show the last step's damage
                raise self._diverged(self.step - 1, inputs, rate, "the model")
        finally:
            self.seconds += time.perf_counter() - began
        return self._close_epoch()

    def finish(self) -> None:
        """At the end: with `ema`, the model takes the mean over, which is then what is measured, pruned and kept."""
        if self._average is not None:
            self._average.adopt()
            distributed.share_buffers(self.model)
        self._make.restart()  # a graph keeps the memory of a whole step
        torch.manual_seed(self._seed)  # a pruner that draws finds the same on every rank

    def _clip(self) -> None:
        """Gradients of dead weights count for nothing: a step does not use them."""
        assert self.engine.config.clip_norm is not None
        for name in self.masks or ():
            gradient = self.masks.weight(name).grad  # type: ignore[union-attr]
            if gradient is not None:
                gradient.mul_(self.masks[name])  # type: ignore[index]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.engine.config.clip_norm)

    def _close_epoch(self) -> float:
        self.last_loss = float(self._make.loss_sum) / max(1, self._loss_steps)
        self._make.loss_sum.zero_()
        self._loss_steps = 0
        return self.last_loss

    def _diverged(self, step: int, inputs: tuple[Tensor, ...], rate: float, what: str = "the loss") -> Diverged:
        x, _ = self.engine.train_set.gather(*inputs)
        layers = [layer for layer in distributed.gather(_first_bad_layer(self.model, x)) if layer is not None]
        where = layers[0] if layers else "the outputs are finite but huge"
        return Diverged(
            f"{what} is not finite at step {step} (epoch {step // self.engine.steps_per_epoch}), learning rate "
            f"{rate:g}: {where}. Lower --lr, or lengthen --warmup"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of this training depends on, the model included; to be called on every rank."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "loss_sum": self._make.loss_sum,
            "loss_steps": self._loss_steps,
            "last_loss": self.last_loss,
            "seconds": self.seconds,
            "rate_factor": self.rate_factor,
            "rng": distributed.gather(self._random()),
        }
        if self._average is not None:
            state["average"] = self._average.state_dict()
        return state

    def _random(self) -> list[Tensor]:
        """This rank's random number generators."""
        device = self.engine.device
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            if "capturable" in group:  # as this run's steps are made, which may not be how they were
                group["capturable"] = self.engine.captured
        self.step, self.last_loss, self.seconds = state["step"], state["last_loss"], state["seconds"]
        self._start, self.rate_factor = self.step, state.get("rate_factor", 1.0)
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._make.restart()
        self._make.loss_sum.copy_(state["loss_sum"])
        self._loss_steps = state["loss_steps"]
        if self._loss_steps and (self.done or self.step % self.engine.steps_per_epoch == 0):
            self._close_epoch()  # it was stopped right after an epoch's last step
        if len(state["rng"]) != distributed.size():
            warnings.warn(
                f"stopped with {len(state['rng'])} processes and resumed with {distributed.size()}: dropout and the "
                "like draw other numbers than they would have",
                stacklevel=2,
            )
            return
        random = state["rng"][distributed.rank()]
        torch.set_rng_state(random[0])
        if len(random) > 1:
            torch.cuda.set_rng_state(random[1], self.engine.device)


@torch.no_grad()
def _all_finite(model: nn.Module) -> bool:
    """Whether all parameters and running statistics are; read back from the device once."""
    statistics = [tensor for _, tensor in _running_statistics(model)]
    tensors = [t for t in [*model.parameters(), *statistics] if t.is_floating_point()]
    return not tensors or bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all())


def _running_statistics(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that training changes. Others may be infinite on purpose, as attention's causal masks are."""
    return [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]


@torch.no_grad()
def _first_bad_layer(model: nn.Module, x: Tensor) -> str | None:
    """Says which layer first gives a number that is not finite; the loss alone overflowed if none does."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"the weights of {name} are not finite"
    for name, buffer in _running_statistics(model):
        if not bool(torch.isfinite(buffer).all()):
            return f"the buffer {name} is not finite"
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not found and not bool(torch.isfinite(output).all()):
                found.append(name)

        return hook

    handles = [m.register_forward_hook(look(n)) for n, m in model.named_modules() if not list(m.children())]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return f"{found[0]} is the first layer whose output is not finite" if found else None
