"""Going back to the last good epoch with a smaller learning rate, where a training diverges."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ap.cycles import Run
from recipes.config import Experiment
from recipes.engine import Diverged, Training


class Recovery:
    """Keeps a training's state at the beginning of each epoch, in memory, and goes back to it, a few times at most.

    Args:
        config: `recover`, how often, and `recover_factor`, what the learning rate is multiplied by each time.
        training: the training.
        run: the training as the loop sees it, whose plugin follows every step and has to go back as well.

    Attributes:
        used: how often it went back.
    """

    def __init__(self, config: Experiment, training: Training, run: Run) -> None:
        self.most, self.factor = config.recover, config.recover_factor
        self.training, self.run = training, run
        self.used = 0
        self._good: dict[str, Any] | None = None

    def keep(self) -> None:
        """Before an epoch: the state is good, since every epoch's end checks the weights."""
        training = self.training
        if self.most and (self._good is None or training.step % training.engine.steps_per_epoch == 0):
            plugin = self.run.loop.plugin.state_dict()
            start = plugin.pop("start")  # which no step changes
            kept = copy.deepcopy({"training": training.state_dict(), "plugin": plugin})
            self._good = {"training": kept["training"], "plugin": {"start": start, **kept["plugin"]}}

    def go_back(self, error: Diverged) -> str:
        """The training is where it was last good, with a smaller rate from now on.

        Returns:
            A sentence that says so.

        Raises:
            Diverged: the error, if it has gone back often enough.
        """
        if self.used == self.most or self._good is None:
            raise error
        self.used += 1
        rate_factor, seconds = self.training.rate_factor * self.factor, self.training.seconds
        good = copy.deepcopy(self._good["training"])  # an optimizer takes over the very tensors it is given
        self.training.load_state_dict(good)
        self.training.rate_factor, self.training.seconds = rate_factor, seconds
        self.run.went_back(self.training.step)
        self.run.loop.plugin.load_state_dict(self._good["plugin"])
        return (
            f"cycle {self.run.cycle}: {str(error).partition('. ')[0]}. Back to epoch {self.training.epoch} with "
            f"{rate_factor:g} × the learning rate (recovery {self.used} of {self.most}): this network is no longer "
            "trained like the other arms'"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint in the middle of the training needs besides the training's own state."""
        return {"used": self.used, "good": self._good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.used, self._good = state["used"], state["good"]
