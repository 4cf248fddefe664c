"""The command line: python -m recipes list | run | sweep | resume | compare | dnr | export | study | answer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import ap.activations
import pruners
from ap import criteria
from ap.names import unknown
from recipes import data as data_sets
from recipes import distributed, experiment, models, presets, report, sweep
from recipes.config import Experiment
from recipes.engine import Engine, Stopped
from recipes.options import read
from recipes.progress import Progress, many
from recipes.storage import locked, plain

COMMANDS = {
    "list": "presets, with what they cost, and the names of arms, pruners, activations, models and data sets",
    "run": "run PRESET [options]: every arm × seed, each in its own folder; goes on where it was stopped",
    "sweep": "sweep PRESET [options]: a grid of experiments; all of it, a list of its runs, or the n-th for job arrays",
    "resume": "resume DIR: goes on with a stopped experiment; one that is finished is only reported",
    "compare": "compare DIR...: tables, paired differences, plots; over several seeds, folders or a sweep",
    "dnr": "dnr MODEL [options]: the dead-neuron rates of any model, a checkpoint or a run's last network on data",
    "export": "export DIR/RUN [options]: a run's last network, compacted, as safetensors and ONNX, with a model card",
    "study": "study NAME [options]: what an activation's paper claims, rebuilt and checked",
    "answer": "answer [NAME] [options]: does AP help, where, and why? Plans, their runs, and pages made from them",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 for runs that failed, 2 for bad input, 130 when stopped."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m recipes COMMAND ...\n")
        for name, about in COMMANDS.items():
            print(f"  {name:8} {about}")
        print("\nEach command explains its options with --help.")
        return 0
    command, rest = arguments[0], arguments[1:]
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)  # type: ignore[assignment]
    try:
        if command not in COMMANDS:
            raise unknown("command", command, COMMANDS)
        if distributed.launched() and command not in ("run", "resume"):
            raise ValueError(f"{command} works in one process: start it without torchrun")
        return int(globals()[f"_{command}"](rest) or 0)
    except (experiment.Failed, distributed.Disagreement) as error:
        _print_error(str(error))
        return 1
    except BrokenPipeError:  # whoever read what is printed, `head` for example, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        named = error.strerror and error.filename is not None
        _print_error(f"{error.filename}: {error.strerror}" if named else " ".join(str(error).split()))
        return 2
    except (ValueError, TypeError, FloatingPointError, ImportError) as error:
        _print_error(" ".join(str(error).split()))
        return 2


def _print_error(text: str) -> None:
    who = "" if distributed.is_main() else f"rank {os.environ['RANK']}: "
    print(f"{who}error: {text}", file=sys.stderr)


# --- list -----------------------------------------------------------------------------------------------------------


def _list(arguments: list[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: python -m recipes list\n\n{COMMANDS['list']}")
        return
    _no_more(arguments, "list")
    print("presets                                (python -m recipes run PRESET --dry-run measures the time)")
    width = max(map(len, presets.PRESETS))
    for name, preset in presets.PRESETS.items():
        config = preset.experiment
        trainings = sum(config.trainings(job.arm) for job in experiment.jobs(config))
        epochs = sum(config.total_epochs(job.arm) for job in experiment.jobs(config))
        print(f"  {name:{width}} {preset.about}")
        print(f"  {'':{width}} {' '.join(config.ap)} × {config.seeds} seeds: {trainings} trainings, {epochs:,} epochs")
    for title, names in {
        "arms (--ap, variant or variant:criterion)": ["none", "lite", "pro", "solo"],
        "criteria": criteria.names(),
        "pruners (--pruner)": pruners.names(),
        "activations (--activation)": ap.activations.names(),
        "models (--model), or package.module:factory": models.names(),
        "data sets (--data), or a folder of images": data_sets.names(),
    }.items():
        print(f"\n{title}\n  {_wrap(names)}")


def _wrap(names: list[str], width: int = 96) -> str:
    import textwrap

    return "\n  ".join(textwrap.wrap("  ".join(names), width, break_on_hyphens=False, break_long_words=False))


# --- run, resume ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unchecked(Experiment):
    """What is compared, on what, and how it is trained: saved in the folder's experiment.json."""

    def __post_init__(self) -> None:
        """Checked by Experiment itself, once all options are read: a bad value is then one line of ours."""


@dataclass(frozen=True)
class Run:
    """Every arm × seed of an experiment."""

    out: Path
    """The experiment's folder."""
    experiment: tyro.conf.OmitArgPrefixes[Unchecked]
    dry_run: bool = False
    """Only say what it would cost, from a short measurement."""
    workers: int | None = None
    """How many runs go side by side; default: as many as there are cores for, one on a GPU."""
    quiet: bool = False
    """No progress."""


def _run(arguments: list[str]) -> int:
    name, rest = presets.split("run", arguments)
    base = presets.get(name).experiment
    default = Run(out=Path("runs") / name, experiment=Unchecked(**dataclasses.asdict(base)))
    options = read(Run, rest, f"python -m recipes run {name}", default=default)
    experiment.check_workers(options.workers)
    config = Experiment(**dataclasses.asdict(options.experiment))
    experiment.check(config)
    if options.dry_run:
        if distributed.launched():
            raise ValueError("--dry-run measures one process: start it without torchrun")
        _cost(config)
        return 0
    return execute(config, options.out, options.workers, options.quiet)


@dataclass(frozen=True)
class Resume:
    """Goes on with a stopped experiment, or with those of a sweep."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """The experiment's or the sweep's folder."""
    workers: int | None = None
    """How many runs go side by side."""
    quiet: bool = False
    """No progress."""


def _resume(arguments: list[str]) -> int:
    if not arguments:
        raise ValueError("resume needs the folder of an experiment or a sweep, such as runs/quickstart")
    options = read(Resume, arguments, "python -m recipes resume")
    experiment.check_workers(options.workers)
    folders = sweep.folders(options.out)
    with distributed.joined():
        for out in folders:
            config = experiment.load(out)
            experiment.refuse_code_inside(out, config)
            experiment.refuse_code_inside(options.out, config)  # of a sweep
            if status := execute(config, out, options.workers, options.quiet):
                return status
    return 0


def _sweep(arguments: list[str]) -> int:
    from recipes import sweep_command

    return sweep_command.main(arguments)


def execute(config: Experiment, out: Path, workers: int | None, quiet: bool) -> int:
    """Runs what is left of an experiment, and reports it; the exit status: 0, or 130 when stopped."""
    if distributed.launched():
        return _execute_together(config, out, workers, quiet)
    with locked(out):
        threads = experiment.prepare(config, out)
        left = [job for job in experiment.jobs(config) if not experiment.is_done(out, job)]
        progress = Progress(config, left, quiet)
        progress.begin(out)
        try:
            experiment.execute(config, out, progress, threads, workers)
        except Stopped:
            progress.close()
            print(f"stopped; go on with: python -m recipes resume {shlex.quote(str(out))}", file=sys.stderr)
            return 130
        finally:
            progress.close()
        return _report(out)


def _execute_together(config: Experiment, out: Path, workers: int | None, quiet: bool) -> int:
    from recipes import torchrun

    if workers is not None:
        raise ValueError("--workers means nothing under torchrun, whose processes all work on the same run")
    with contextlib.ExitStack() as held:
        try:
            torchrun.execute(config, out, quiet, held)
        except Stopped:
            if distributed.is_main():
                print(f"stopped; go on with: torchrun ... -m recipes resume {shlex.quote(str(out))}", file=sys.stderr)
            return 130
        return _report(out) if distributed.is_main() else 0


def _report(out: Path) -> int:
    found = report.of_folder(out)
    pictures = found.save(out)
    print(found)
    print(f"\nplots: {', '.join(str(path) for path in pictures)}")
    print(f"tables: {out / 'summary.md'}, {out / 'summary.csv'}, {out / 'summary.json'}")
    print(f"TensorBoard: tensorboard --logdir {shlex.quote(str(out))}")
    return 0


def _cost(config: Experiment) -> None:
    """Times a few steps of the real training, and multiplies."""
    data = experiment.load_data(config)
    experiment.rehearse(config, data)
    engine = Engine(config, data, config.first_seed)
    model = engine.prepare(experiment.build(config, data, config.first_seed))
    training = engine.training(model, 0, 0)
    began: list[float] = []

    def after_step(step: int) -> None:
        began.append(time.perf_counter())
        if step > 3 and (began[-1] - began[0] > 3 or step > 30):
            raise Stopped

    with contextlib.suppress(Stopped):
        training.run_epoch(after_step)
    per_step = (began[-1] - began[0]) / max(1, len(began) - 1)
    todo = experiment.jobs(config)
    trainings = sum(config.trainings(job.arm) for job in todo)
    steps = sum(config.total_epochs(job.arm) for job in todo) * engine.steps_per_epoch
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{config.model} ({weights:,} parameters) on {config.data}: {len(data.train):,} images, {engine.device}")
    print(f"{len(todo)} runs ({' '.join(config.ap)} × {config.seeds} seeds), {trainings} trainings, {steps:,} steps")
    print(
        f"a step takes {1e3 * per_step:.1f} ms here: about {_duration(per_step * steps)} for all, one after the other"
    )


def _duration(seconds: float) -> str:
    """
    >>> _duration(75), _duration(7300)
    ('1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:,.0f} h {seconds % 3600 // 60:.0f} min"


# --- compare --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compare:
    """Tables, paired differences and plots of experiments, finished or not.

    Folders of the same configuration but other seeds or arms are pooled. Over several experiments, those of a sweep
    for instance, there is a table for each, ordered by pruner, and one correction for all comparisons.
    """

    out: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DIR…")]
    """The folders of experiments or sweeps."""
    json: bool = False
    """Print JSON instead of tables, a line an experiment."""
    save: Path | None = None
    """Write what is compared together here; a single sweep's own folder if not given."""


def _compare(arguments: list[str]) -> None:
    from recipes.pool import Pool

    options = read(Compare, arguments, "python -m recipes compare")
    if not options.out:
        raise ValueError("compare needs the folder of an experiment")
    folders = list(dict.fromkeys(folder for out in options.out for folder in sweep.folders(out)))
    begun = [folder for folder in folders if any(folder.glob("*/metrics.jsonl"))]
    if 0 < len(begun) < len(folders):
        print(f"no trained network yet in {len(folders) - len(begun)} of {len(folders)} experiments", file=sys.stderr)
        folders = begun
    pictures = [picture for folder in folders for picture in report.of_folder(folder).save(folder)]
    pool = Pool(folders)
    is_sweep = len(options.out) == 1 and options.out[0] not in folders
    target = options.save or (options.out[0] if is_sweep else None)
    if target:
        pictures = pool.save(target)
    if options.json:
        for found in pool.reports:
            print(json.dumps(plain(found.to_dict()), allow_nan=False))
        return
    if len(pool.reports) == 1:
        config = pool.reports[0].config
        print(f"{config.model} on {config.data}, pruner {config.pruner}, {many(config.epochs, 'epoch')} a training")
        print(pool.reports[0])
    else:
        print(pool)
    print(f"\nplots: {', '.join(str(path) for path in pictures)}")


# --- dnr ------------------------------------------------------------------------------------------------------------


def _dnr(arguments: list[str]) -> None:
    from recipes import dnr_command

    dnr_command.main(arguments)


# --- export ---------------------------------------------------------------------------------------------------------


def _export(arguments: list[str]) -> None:
    from recipes.export import ExportConfig, export

    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        raise ValueError("export needs the folder of a run first, such as runs/quickstart/lite-seed0")
    named = not arguments[0].startswith("-")
    folder = Path(arguments[0]) if named else Path("RUN")
    default = ExportConfig(out=folder / "export")
    rest = arguments[1:] if named else arguments
    options = read(ExportConfig, rest, f"python -m recipes export {folder}", default=default)
    config, data, model, row = experiment.last_network(folder)
    example = next(Engine(config, data, 0).test_set.batches(size=1))[0].cpu()
    made = {"experiment": config.to_dict(), "last row of its metrics": row}
    exported = export(model.cpu(), example, options, made)
    print(exported.comparison)
    for kind, path in exported.files.items():
        print(f"{kind}: {path}")


# --- study, answer ----------------------------------------------------------------------------------------------------


def _study(arguments: list[str]) -> int:
    from recipes import studies

    return int(studies.cli(arguments) or 0)


def _answer(arguments: list[str]) -> int:
    from recipes.answers import command

    return command.main(arguments)


def _no_more(arguments: list[str], command: str) -> None:
    if arguments:
        raise ValueError(f"{command} takes no arguments, got {' '.join(arguments)}")
