"""An experiment under torchrun: its runs one after the other, each on all processes together."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from recipes import distributed, experiment
from recipes.config import Experiment, Job
from recipes.engine import device_of, tell_cublas
from recipes.experiment import Failed
from recipes.one_run import Say
from recipes.progress import Progress
from recipes.storage import locked


def execute(config: Experiment, out: Path, quiet: bool, held: ExitStack) -> None:
    """Runs what is left of an experiment; to be called by every process that torchrun started.

    Rank 0 writes all files, and the others get from it what they need to know. A process that dies ends the others;
    the experiment is then resumed like any other.

    Args:
        config: the experiment.
        out: its folder.
        quiet: no progress.
        held: rank 0 keeps the folder's lock in it.

    Raises:
        ValueError: combinations that make no sense, or more than the devices can do.
        Stopped: by SIGINT or SIGTERM to any process, after the run has saved where it stands.
        Failed: runs diverged; the others were made.
    """
    experiment.check(config)
    device = device_of(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        tell_cublas(config)
    with distributed.joined():
        threads, left = distributed.on_main(lambda: _begin(config, out, held))
        torch.set_num_threads(threads)
        distributed.on_main(lambda: experiment.load_data(config) and None)  # packed by one, then read by all
        if left:
            experiment.rehearse(config, experiment.load_data(config))
        progress = Progress(config, left, quiet or distributed.rank() > 0)
        progress.begin(out)
        try:
            _run_all(config, out, left, progress)
        finally:
            progress.close()


def _begin(config: Experiment, out: Path, held: ExitStack) -> tuple[int, list[Job]]:
    held.enter_context(locked(out))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = experiment.prepare(config, out, side_by_side=here)
    return threads, [job for job in experiment.jobs(config) if not experiment.is_done(out, job)]


def _run_all(config: Experiment, out: Path, left: list[Job], say: Say) -> None:
    stop: Any = threading.Event()
    failures = []
    with experiment.stopping(stop, insist=False):  # a terminal's Ctrl-C comes twice, from torchrun as well
        for job in left:
            try:
                experiment.run(config, out / job.name, job, say, stop.is_set)
                outcome = "done"
            except FloatingPointError as error:  # on all ranks alike
                outcome = str(error)
                failures.append(f"{job.name}: {outcome}")
            if distributed.rank() == 0:
                say({"event": "done" if outcome == "done" else "failed", "job": job.name, "why": outcome})
    if failures:
        raise Failed.by_reason(failures)
