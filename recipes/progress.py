"""How far an experiment is: one line on a terminal, one line a trained network elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from recipes.config import Experiment, Job


class Progress:
    """Takes the events of `experiment.execute`; counts epochs over the whole experiment, so that the time left is too.

    Args:
        config: the experiment.
        left: the runs that are not done.
        quiet: say nothing but warnings.
    """

    def __init__(self, config: Experiment, left: list[Job], quiet: bool = False) -> None:
        self.quiet = quiet
        self.drawn = sys.stderr.isatty() and not quiet
        total = sum(config.total_epochs(job.arm) for job in left)
        self.bar = tqdm(total=total, unit="epoch", disable=not self.drawn, dynamic_ncols=True)

    def __call__(self, event: dict[str, Any]) -> None:
        """One event of a run."""
        kind, job = event["event"], event["job"]
        if kind == "epoch":
            self.bar.update(1)
            dnr = "" if event["dnr"] is None else f", DNR {event['dnr']:.0%}"
            again = " again" if event["phase"] == "retrain" else ""
            text = f"{job}: cycle {event['cycle']}{again}, epoch {event['epoch']}, loss {event['loss']:.3f}{dnr}"
            self.bar.set_description_str(text, refresh=False)
        elif kind == "row" and not self.drawn:
            dnr = "" if event["dnr"] is None else f", dead {event['dnr']:.1%}"
            self.say(
                f"{job}: cycle {event['cycle']}, density {event['density']:.1%}, accuracy {event['accuracy']:.2%}{dnr}"
            )
        elif kind in ("warning", "failed"):
            self.say(f"{job}: {event['why']}", always=True)

    def say(self, text: str, always: bool = False) -> None:
        """A line that does not break the bar."""
        if always or not self.quiet:
            self.bar.write(text, file=sys.stderr) if self.drawn else print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self.bar.close()
