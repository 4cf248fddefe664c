"""How far an experiment is: one line on a terminal; elsewhere one a trained network, and one a minute in between."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recipes.config import Experiment, Job

SPEAK_EVERY_S = 60.0


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
        self.config = config
        self.left = {job.name: job.arm for job in left}
        self.epochs: dict[str, int] = {}  # that a run has made, those before it was stopped included
        self.spoke_at = time.monotonic()
        total = sum(config.total_epochs(job.arm) for job in left)
        self.bar = tqdm(total=total, unit="epoch", disable=not self.drawn, dynamic_ncols=True)

    def begin(self, out: Path) -> None:
        """What is to be done, before the first training ends."""
        config, runs = self.config, len(self.config.arms) * self.config.seeds
        done = "" if len(self.left) == runs else f", {runs - len(self.left)} done" if self.left else ", all done"
        arms = f"{' '.join(config.ap)} × {many(config.seeds, 'seed')}"
        self.say(f"{config.model} on {config.data}, {arms}: {many(runs, 'run')} in {out}{done}")

    def __call__(self, event: dict[str, Any]) -> None:
        """One event of a run."""
        kind, job = event["event"], event["job"]
        if kind == "epoch":
            if self.drawn:
                self._count(event)
            dnr = "" if event["dnr"] is None else f", DNR {event['dnr']:.0%}"
            again = " again" if event["phase"] == "retrain" else ""
            text = f"{job}: cycle {event['cycle']}{again}, epoch {event['epoch']}, loss {event['loss']:.3f}{dnr}"
            self.bar.set_description_str(text, refresh=False)
            if not self.drawn and time.monotonic() - self.spoke_at > SPEAK_EVERY_S:
                self.say(text)
        elif kind == "row" and not self.drawn:
            dnr = "" if event["dnr"] is None else f", dead {event['dnr']:.1%}"
            self.say(
                f"{job}: cycle {event['cycle']}, density {event['density']:.1%}, accuracy {event['accuracy']:.2%}{dnr}"
            )
        elif kind in ("warning", "failed"):
            self.say(f"{job}: {event['why']}", always=True)
        elif kind == "stopping":
            self.say("stopping: each run saves where it stands", always=True)

    def _count(self, event: dict[str, Any]) -> None:
        """One epoch more; a run that was resumed brings along what it had, which took no time now."""
        job = event["job"]
        now = self.config.epochs_before(self.left[job], event["cycle"], event["phase"]) + event["epoch"]
        if job not in self.epochs:
            self.epochs[job] = now - 1
            self.bar.n += now - 1
            self.bar.initial += now - 1
            self.bar.last_print_n += now - 1
        self.bar.update(now - self.epochs[job])
        self.epochs[job] = now

    def say(self, text: str, always: bool = False) -> None:
        """A line that does not break the bar."""
        self.spoke_at = time.monotonic()
        if always or not self.quiet:
            self.bar.write(text, file=sys.stderr) if self.drawn else print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self.bar.close()


def many(count: int, noun: str) -> str:
    """A number of things.

    >>> many(1, "run"), many(6, "run")
    ('1 run', '6 runs')
    """
    return f"{count} {noun}{'s' * (count != 1)}"
