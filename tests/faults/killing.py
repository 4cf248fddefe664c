"""Runs one small experiment again and again, killed at a moment of choice each time, and resumed.

    python tests/faults/killing.py DIR MOMENT [MOMENT …]

A moment is a function and which call of it: "Masks.prune:2" dies at the end of the second call, "<write_whole:3" at the
beginning of the third. Each run is a fork of this process, so that dozens of kills cost one import. Prints a JSON line
for each: whether it was killed, and whether metrics, weights and masks are those of the undisturbed run, to the bit.
"""

import functools
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from ap import AP, Masks
from ap.rewind import Snapshot
from recipes import experiment, report, storage
from recipes.config import Arm, Experiment
from recipes.engine import Engine, Training
from recipes.storage import Checkpoints

CONFIG = Experiment(
    ap=("pro",), model="lenet-300-100", data="digits", cycles=2, amount=0.36, rate=0.04, epochs=2, batch_size=100,
    seeds=1, monitor_every=5, device="cpu", threads=1, pruner="lamp", rewind="9it",
)  # fmt: skip
JOB = experiment.Job(Arm.parse("pro"), 0)
PLACES = {
    "Training.step": (torch.optim.SGD, "step"),
    "Training.load_state_dict": (Training, "load_state_dict"),
    "Masks.prune": (Masks, "prune"),
    "Masks.remove": (Masks, "remove"),
    "AP.preview": (AP, "preview"),
    "AP.mark_start": (AP, "mark_start"),
    "Snapshot.restore": (Snapshot, "restore"),
    "Engine.evaluate": (Engine, "evaluate"),
    "Checkpoints.save": (Checkpoints, "save"),
    "Checkpoints.latest": (Checkpoints, "latest"),
    "write_whole": (storage, "write_whole"),
    "replace": (os, "replace"),
    "fsync": (os, "fsync"),
    "unlink": (Path, "unlink"),
    "mkstemp": (tempfile, "mkstemp"),
    "Report.save": (report.Report, "save"),
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment):
    """Makes this process die at a moment."""
    if moment.startswith("after:"):  # so many seconds
        signal.signal(signal.SIGALRM, lambda *_: die())
        signal.setitimer(signal.ITIMER_REAL, float(moment[6:]))
        return
    place, _, number = moment.lstrip("<").partition(":")
    owner, name = PLACES[place]
    original, left = getattr(owner, name), [int(number)]

    @functools.wraps(original)
    def deadly(*arguments, **options):
        left[0] -= 1
        if left[0] == 0 and moment.startswith("<"):
            die()
        result = original(*arguments, **options)
        if left[0] == 0:
            die()
        return result

    setattr(owner, name, deadly)


def whole(out):
    """One run from where it stands to its end, and its report."""
    experiment.SAVE_EVERY_S = 0.0  # a checkpoint after every epoch
    with storage.locked(out):  # as the command line does
        experiment.prepare(CONFIG, out)
        if not experiment.is_done(out, JOB):
            experiment.run(CONFIG, out / JOB.name, JOB, experiment.say_nothing, lambda: False)
        report.of_folder(out).save(out)


def fork(out, moment=None):
    """The exit status of a run in a process of its own; negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        try:
            if moment:
                arm(moment)
            whole(out)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(out):
    """Everything that must not depend on what happened on the way."""
    rows = storage.read_rows(out / JOB.name / "metrics.jsonl")
    rows = [{key: value for key, value in row.items() if not key.endswith("_s")} for row in rows]
    state = Checkpoints(out / JOB.name / "checkpoints").latest()
    masks = state["loop"]["masks"]["bits"]
    summary = storage.read_json(out / "summary.json")
    return rows, state["model"], masks, summary["cells"]


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def main(folder, *moments):
    torch.set_num_threads(1)
    folder = Path(folder)
    began = time.monotonic()
    if fork(folder / "whole"):
        sys.exit("the undisturbed run failed")
    seconds = time.monotonic() - began
    expected = result(folder / "whole")
    dice = random.Random(0)
    for number, moment in enumerate(moments):
        chosen = f"after:{dice.uniform(0, 0.95 * seconds):.3f}" if moment == "random" else moment
        out = folder / str(number)
        killed = fork(out, chosen) == -signal.SIGKILL
        status = fork(out)
        left = [str(path) for path in out.rglob("*.part")]
        answer = {"moment": chosen, "killed": killed, "status": status, "left": left}
        print(json.dumps({**answer, "same": status == 0 and same(result(out), expected)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
