"""python -m recipes sweep: a grid of experiments, all of it, a list of its runs, or the n-th."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from recipes import experiment, presets, report, sweep
from recipes.cli import Unchecked, execute
from recipes.config import Experiment
from recipes.engine import Stopped
from recipes.options import read
from recipes.pool import Pool
from recipes.progress import Progress
from recipes.storage import locked


@dataclass(frozen=True)
class Grid(Unchecked):
    """An experiment's options, several values of some."""

    model: tuple[str, ...] = ()  # type: ignore[assignment]
    """Models that `list` shows, or package.module:factory."""
    data: tuple[str, ...] = ()  # type: ignore[assignment]
    """Data sets that `list` shows, or folders of images."""
    pruner: tuple[str, ...] = ()  # type: ignore[assignment]
    """Pruners that `list` shows."""
    activation: tuple[str, ...] = ()  # type: ignore[assignment]
    """Activations that `list` shows; each model's own if none is given."""
    rewind: tuple[str, ...] = ()  # type: ignore[assignment]
    """Where the weights go back to after each pruning: init, steps (500it, 2ep), lr, none."""
    rate: tuple[float, ...] = ()  # type: ignore[assignment]
    """q: the shares of the weights alive that AP removes in each cycle."""


@dataclass(frozen=True)
class Sweep:
    """Every combination of the models, data sets, pruners, activations, rewinds and rates given, × arms × seeds."""

    out: Path
    """The sweep's folder; each experiment has its own inside."""
    experiment: tyro.conf.OmitArgPrefixes[Grid]
    list: bool = False
    """Only list all runs: a command each, which a shell can run, and what has been done of it."""
    run: int | None = None
    """Only the run with this number, from 0, such as $SLURM_ARRAY_TASK_ID; several may be under way at a time."""
    workers: int | None = None
    """How many runs go side by side."""
    quiet: bool = False
    """No progress."""


def main(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    name, rest = presets.split("sweep", arguments)
    base = presets.get(name).experiment
    axes = {axis: (value,) if (value := getattr(base, axis)) is not None else () for axis in sweep.AXES}
    default = Sweep(out=Path("runs") / f"{name}-sweep", experiment=Grid(**{**dataclasses.asdict(base), **axes}))
    options = read(Sweep, rest, f"python -m recipes sweep {name}", default=default)
    experiment.check_workers(options.workers)
    if options.list and options.run is not None:
        raise ValueError("--list and --run exclude each other: --list shows what --run can be")
    asked = dataclasses.asdict(options.experiment)
    values = {axis: asked.pop(axis) for axis in sweep.AXES}
    for axis in sweep.AXES:
        if not values[axis] and axis != "activation":
            raise ValueError(f"--{axis}: give at least one value")
    values["activation"] = values["activation"] or (None,)
    common = Experiment(**asked, **{axis: getattr(base, axis) for axis in sweep.AXES})
    grid = sweep.experiments(common, values, options.out)
    tasks = sweep.tasks(grid)
    if options.list:
        _list(tasks, grid, arguments)
        return 0
    if options.run is not None:
        if not 0 <= options.run < len(tasks):
            raise ValueError(f"--run must be 0 to {len(tasks) - 1}, not {options.run}: --list shows them")
        return _task(tasks[options.run], options.quiet)
    return _all(grid, options)


def _list(tasks: list[sweep.Task], grid: dict[Path, Experiment], arguments: list[str]) -> None:
    command = f"python -m recipes sweep {shlex.join(a for a in arguments if a != '--list')}"
    print(f"# {len(grid)} experiments, {len(tasks)} runs; each line is one, and they may run at the same time.")
    print(f"# As a job array: sbatch --array=0-{len(tasks) - 1} --wrap '{command} --run \"$SLURM_ARRAY_TASK_ID\"'")
    for number, task in enumerate(tasks):
        state = "done" if experiment.is_done(task.folder, task.job) else ""
        state = state or ("begun" if (task.folder / task.job.name / "config.json").exists() else "to do")
        print(f"{command} --run {number}  # {task.name}, {state}")


def _task(task: sweep.Task, quiet: bool) -> int:
    """One run, beside others that may be under way in the same experiment's folder."""
    with locked(task.folder, patience_s=60, alone=False):
        threads = experiment.prepare(task.config, task.folder, side_by_side=1)
    progress = Progress(task.config, [task.job], quiet)
    try:
        experiment.execute(task.config, task.folder, progress, threads, workers=1, only=[task.job])
    except Stopped:
        print("stopped; the same command goes on with it", file=sys.stderr)
        return 130
    finally:
        progress.close()
    if all(experiment.is_done(task.folder, job) for job in experiment.jobs(task.config)):
        with locked(task.folder, patience_s=60, alone=False):  # two that end together write the same
            report.of_folder(task.folder).save(task.folder)
    print(f"{task.folder / task.job.name} is done")
    return 0


def _all(grid: dict[Path, Experiment], options: Sweep) -> int:
    """One experiment after the other; one that fails does not keep the others from running."""
    failures = []
    for number, (folder, config) in enumerate(grid.items(), 1):
        print(f"{number}/{len(grid)}: {folder.name}")
        try:
            if execute(config, folder, options.workers, options.quiet) == 130:
                return 130
        except experiment.Failed as error:
            failures.append(f"{folder.name}: {error}")
            print(f"error: {error}", file=sys.stderr)
    if failures:
        raise experiment.Failed(f"{len(failures)} of {len(grid)} experiments failed; the same command tries them again")
    if len(grid) > 1:
        pool = Pool(list(grid))
        pictures = pool.save(options.out)
        print(f"\n{pool}\n\nplots: {', '.join(str(path) for path in pictures)}")
    return 0
