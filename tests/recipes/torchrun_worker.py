"""Run by torchrun: the command line, with a fault in one rank.

torchrun --nproc-per-node 2 tests/recipes/torchrun_worker.py FAULT RANK STEP COMMAND …

FAULT is "none", "slow" (every step takes longer), "kill" (this rank dies in a step, counted over all its trainings, and
notes when) or "scores" (its pruner's scores are its own).
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

import pruners
from recipes import distributed, one_run
from recipes.cli import main
from recipes.step import Step


def die_after(steps, note):
    original, left = Step.__call__, [steps]

    def step(self, *arguments):
        left[0] -= 1
        if left[0] == 0:
            note.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    Step.__call__ = step


def slow_down():
    """So that a signal finds it in the middle of a training."""
    original = Step.__call__

    def step(self, *arguments):
        time.sleep(0.05)
        return original(self, *arguments)

    Step.__call__ = step


def own_scores():
    kind = type(pruners.create("magnitude"))
    original = kind.scores

    def scores(self, model, masks, *arguments, **options):
        found = dict(original(self, model, masks, *arguments, **options))
        if distributed.size() > 1:
            found["fc2.weight"] = torch.rand_like(found["fc2.weight"])
        return found

    kind.scores = scores


if __name__ == "__main__":
    fault, rank, number, *command = sys.argv[1:]
    one_run.SAVE_EVERY_S = 0.0  # a checkpoint after every epoch
    if fault == "slow":
        slow_down()
    if os.environ["RANK"] == rank:
        if fault == "kill":
            die_after(int(number), Path(f"{command[-1]}.died"))
        if fault == "scores":
            own_scores()
    status = main(command)
    # Threads of a process group that somebody keeps abort the process, now and then, when it exits.
    left = [
        name for name in (task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")) if "gloo" in name
    ]
    sys.exit(f"left behind: {left}" if left else status)
