"""The learning rate of every step of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipes.config import Experiment, Span


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step.

    Warm-up is linear from 0; each milestone that has passed multiplies the rate by gamma and wins over what is left of
    the warm-up; "cosine" and "linear" fall to 0 at the last step.

    >>> schedule = Schedule(lr=1.0, total=10, warmup=4, kind="steps", milestones=(3,), gamma=0.1)
    >>> [round(schedule(step), 3) for step in range(5)]
    [0.25, 0.5, 0.75, 0.1, 0.1]
    """

    lr: float
    total: int
    warmup: int = 0
    kind: str = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def __call__(self, step: int) -> float:
        """The rate that the step with this number (from 0) is made with."""
        passed = sum(step >= milestone for milestone in self.milestones)
        if passed:
            return self.lr * self.gamma**passed
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        if self.kind == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (1 - progress) if self.kind == "linear" else self.lr

    @classmethod
    def of(cls, config: Experiment, steps_per_epoch: int, cycle: int) -> Schedule:
        """The schedule of the trainings of this cycle."""
        return cls(
            lr=config.training_lr(cycle),
            total=config.training_epochs(cycle) * steps_per_epoch,
            warmup=Span.parse(config.warmup).steps(steps_per_epoch),
            kind=config.schedule,
            milestones=tuple(Span.parse(text).steps(steps_per_epoch) for text in config.milestones),
            gamma=config.gamma,
        )
