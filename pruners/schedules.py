"""When how much goes: a curve says what share of the whole is gone after which share of the way.

One-shot pruning is one call of `prune`; iterative pruning is `rounds=` (exponential) or the cycles of `ap.cycles`;
`Gradual` follows a curve within one training run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ap.masks import Masks, check_share
from ap.names import unknown

if TYPE_CHECKING:
    from pruners.base import Pruner

Curve = Callable[[float, float], float]
"""(progress in [0, 1], share that stays at the end) -> share that stays now."""


def linear(progress: float, left: float) -> float:
    """The same number in every step."""
    return 1 - (1 - left) * progress


def exponential(progress: float, left: float) -> float:
    """The same share of what is alive in every step: left^progress (Tanaka et al. 2020; also the cycles' schedule)."""
    return left**progress


def cubic(progress: float, left: float) -> float:
    """Fast at first, slower towards the end (Zhu & Gupta 2017, equation 1).

    >>> cubic(0.0, 0.1), round(cubic(0.5, 0.1), 4), round(cubic(1.0, 0.1), 4)
    (1.0, 0.2125, 0.1)
    """
    return left + (1 - left) * (1 - progress) ** 3


CURVES: dict[str, Curve] = {"linear": linear, "exponential": exponential, "cubic": cubic}


def removed_by(curve: Curve, progress: float, alive: int, gone: int) -> int:
    """How many of `alive` weights are gone after this share of the way, if `gone` are at its end; exact at the end.

    >>> [removed_by(exponential, k / 2, 100, 75) for k in (1, 2)]
    [50, 75]
    """
    return gone if progress >= 1 or not gone else min(gone, round(alive * (1 - curve(progress, 1 - gone / alive))))


class Gradual:
    """Prunes along a curve within one training run, by any pruner.

    Args:
        pruner: a pruner, or a plain function `(model, masks) -> scores`. Its own rounds happen at each pruning.
        model, masks: what it prunes; bind the optimizer with `masks.bind`, so that dead weights stay dead.
        amount: the share of the weights alive now that are gone at the end, in (0, 1).
        steps: the optimizer steps from `start` to the last pruning.
        start: the step of the first pruning.
        every: prune in each of that many steps.
        curve: "cubic" (Zhu & Gupta 2017), "exponential" or "linear", or a function `(progress, left) -> left now`.
        batches, loss_fn: for pruners that need data.

    Raises:
        ValueError: an amount outside (0, 1), steps or every below 1, an unknown curve.

    Example:
        >>> import torch, pruners
        >>> model = nn.Linear(10, 10)
        >>> masks = Masks(model)
        >>> gradual = Gradual(pruners.create("magnitude"), model, masks, amount=0.9, steps=4, every=2)
        >>> [gradual.step(step) for step in range(6)]
        [0, 0, 79, 0, 11, 0]
        >>> masks.alive
        10
    """

    def __init__(
        self,
        pruner: Pruner | Callable[..., Any],
        model: nn.Module,
        masks: Masks,
        *,
        amount: float,
        steps: int,
        start: int = 0,
        every: int = 1,
        curve: str | Curve = "cubic",
        batches: Iterable[Any] | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        from pruners.base import create, repeatable

        if steps < 1 or every < 1 or start < 0:
            raise ValueError(f"steps and every must be at least 1 and start 0, not {steps}, {every} and {start}")
        if isinstance(curve, str) and curve not in CURVES:
            raise unknown("curve", curve, CURVES)
        self.pruner = create(pruner)
        self.model, self.masks = model, masks
        self.steps, self.start, self.every = steps, start, every
        self.curve = CURVES[curve] if isinstance(curve, str) else curve
        self.batches = None if batches is None else repeatable(batches)
        self.loss_fn = loss_fn
        self.alive = masks.alive
        self.gone = check_share(amount, "amount", self.alive)

    def step(self, step: int) -> int:
        """To be called after each optimizer step, with the number of steps made; returns how many weights went."""
        since = step - self.start
        if since < 0 or (since % self.every and since < self.steps):
            return 0
        target = self.alive - removed_by(self.curve, min(1.0, since / self.steps), self.alive, self.gone)
        alive = self.masks.alive
        if target >= alive:
            return 0
        return self.pruner.prune(
            self.model, self.masks, amount=(alive - target) / alive, batches=self.batches, loss_fn=self.loss_fn
        )

    def state_dict(self) -> dict[str, int]:
        """What it needs to go on after a restart, beside the masks."""
        return {"alive": self.alive, "gone": self.gone}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where `state_dict()` was taken."""
        self.alive, self.gone = state["alive"], state["gone"]
