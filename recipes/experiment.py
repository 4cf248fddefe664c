"""Arms × seeds, each in a folder of its own: run, stopped, resumed, and side by side."""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import shlex
import signal
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pruners
from ap import AP, Masks
from ap.compaction import fit_
from recipes import data as data_sets
from recipes import distributed, models
from recipes.config import SCHEMA, Experiment, Job, differences
from recipes.engine import Stopped, can_capture, check_batches, device_of
from recipes.hearing import heard
from recipes.one_run import OneRun, Say
from recipes.storage import (
    Checkpoints,
    FolderError,
    locked,
    read_json,
    read_rows,
    refuse_links,
    sha256,
    state_errors,
    write_json,
)
from recipes.turns import AT_MOST
from recipes.workers import Flag, start_worker, work

MOST = {"threads": 1024, "seed": 2**63}  # what the configuration of an experiment allows


class Failed(RuntimeError):
    """Some runs did not end well; the message says which and why."""

    @classmethod
    def by_reason(cls, failures: Sequence[str]) -> Failed:
        """A line for each reason, with the runs that it is of.

        >>> print(Failed.by_reason(["none-seed0: no memory", "lite-seed0: diverged", "none-seed1: no memory"]))
        none-seed0, none-seed1: no memory
        lite-seed0: diverged
        """
        runs: dict[str, list[str]] = {}
        for text in failures:
            run, _, why = text.partition(": ")
            runs.setdefault(why, []).append(run)
        return cls("\n".join(f"{', '.join(its)}: {why}" for why, its in runs.items()))


def jobs(config: Experiment) -> list[Job]:
    """All runs of an experiment, the seeds outermost, so that an unfinished experiment is still paired."""
    return [Job(arm, seed) for seed in config.seed_list for arm in config.arms]


def prepare(config: Experiment, out: Path, side_by_side: int | None = None) -> int:
    """Writes the experiment's configuration into its folder, or checks the one that is there.

    An experiment grows where the one asked for has more seeds or arms and is otherwise the same: what is done stays.
    One of which no run has begun, because its data were missing for example, gives way to any other.

    Args:
        config: the experiment.
        out: its folder.
        side_by_side: how many runs share the machine; all of the experiment's on a CPU, if not given.

    Returns:
        The number of CPU threads of each run. It is decided once and kept in the folder, because the last bits of sums
        depend on it: a run that is resumed alone must not get more threads than it had beside others.

    Raises:
        FolderError: the folder belongs to another experiment, or to something else.
    """
    path = out / "experiment.json"
    if path.exists():
        before, threads = _saved(path, "threads")
        odd = differences(before.to_dict(), config.to_dict())
        begun = any(out.glob("*/config.json"))
        if odd and begun and not _grows(before, config):
            raise FolderError(f"{out} holds another experiment ({'; '.join(odd)}): choose another --out")
        if odd and begun:
            write_json(path, {"schema": SCHEMA, "experiment": config.to_dict(), "threads": threads})
        if begun or not odd:
            return threads
    elif out.exists() and any(child.name != ".lock" for child in out.iterdir()):
        raise FolderError(f"{out} is not empty, and not the folder of an experiment: choose another --out")
    if side_by_side is None:
        side_by_side = 1 if device_of(config.device).type != "cpu" else len(jobs(config))
    threads = config.threads or max(1, _cores() // side_by_side)
    write_json(path, {"schema": SCHEMA, "experiment": config.to_dict(), "threads": threads})
    return threads


def _grows(before: Experiment, wanted: Experiment) -> bool:
    """Whether `wanted` has all runs of the experiment before, and more."""
    same = replace(wanted, ap=before.ap, seeds=before.seeds, first_seed=before.first_seed) == before
    return same and set(jobs(before)) < set(jobs(wanted))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(out: Path) -> Experiment:
    """The configuration of the experiment in a folder."""
    return _saved(out / "experiment.json", "threads")[0]


def _saved(path: Path, key: str) -> tuple[Experiment, int]:
    """The configuration in a file, and the number that stands beside it under a key."""
    saved = read_json(path)
    if saved.get("schema") != SCHEMA:
        raise FolderError(f"{path.parent}: written by another version (schema {saved.get('schema')}, not {SCHEMA})")
    try:
        config = Experiment.from_dict(dict(saved["experiment"]))
    except (LookupError, TypeError, AttributeError) as error:
        raise FolderError(f"{path} is damaged: {type(error).__name__} {error}") from None
    number = saved.get(key)
    if type(number) is not int or not 0 <= number <= MOST[key]:
        raise FolderError(f"{path} is damaged: {key} is {number!r}")
    return config, number


def refuse_code_inside(out: Path, config: Experiment) -> None:
    """FolderError where a saved experiment's model would be imported from its own folder, which may be a stranger's."""
    if ":" not in config.model:
        return
    package = config.model.partition(":")[0].partition(".")[0]
    spec = importlib.util.find_spec(package)  # of a package's first name: nothing is imported for it
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    if any(place is not None and Path(place).resolve().is_relative_to(out.resolve()) for place in places):
        raise FolderError(
            f"the model {config.model} is code in the experiment's own folder {out}, which is not run: "
            "if you trust it, move it elsewhere and put that on PYTHONPATH"
        )


def rows(out: Path, config: Experiment) -> dict[Job, list[dict[str, Any]]]:
    """The rows of every run that has any."""
    found = {}
    for job in jobs(config):
        path = out / job.name / "metrics.jsonl"
        if path.exists():
            if is_finished(out, job) and not is_done(out, job):
                raise FolderError(
                    f"{path} is damaged; restore it with: python -m recipes resume {shlex.quote(str(out))}"
                )
            found[job] = read_rows(path)
            check_rows(path, found[job])
    return found


def check_rows(path: Path, found: list[dict[str, Any]]) -> None:
    """FolderError where rows are not what a run writes: they may come from strangers."""
    for number, row in enumerate(found):
        where = f"{path}, line {number + 1}, is damaged"
        if row.get("schema", SCHEMA) != SCHEMA:
            raise FolderError(f"{path}, line {number + 1}: written by another version (schema {row['schema']!r})")
        for key in ("cycle", "alive"):
            if type(row.get(key)) is not int or not _is_number(row[key]):
                raise FolderError(f"{where}: {key} is {row.get(key)!r}")
        if row["cycle"] != number:
            raise FolderError(f"{where}: cycle {row['cycle']} follows {number - 1}")
        layers = row.get("dnr_layers", {})
        rates = list(layers.values()) if isinstance(layers, dict) else [None]
        if not all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in rates):
            raise FolderError(f"{where}: dnr_layers are not two rates a layer")
        if list(layers) != list(found[0].get("dnr_layers", {})):
            raise FolderError(f"{where}: dnr_layers are of other layers than in the line before")
        for key, value in row.items():
            if key != "dnr_layers" and value is not None and not _is_number(value):
                raise FolderError(f"{where}: {key} is {value!r}, not a number")


def _is_number(value: Any) -> bool:
    """Whether statistics can be made of it: Python reads whole numbers of thousands of digits, which overflow there."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def is_finished(out: Path, job: Job) -> bool:
    """Whether a run has come to its end."""
    return (out / job.name / "done.json").exists()


def is_done(out: Path, job: Job) -> bool:
    """Whether a run has come to its end and its metrics are those that it wrote; a warning where they are not."""
    metrics = out / job.name / "metrics.jsonl"
    if not is_finished(out, job):
        return False
    try:
        digest = read_json(out / job.name / "done.json").get("sha256")
        if digest is None or digest == sha256(metrics):
            return True
    except (ValueError, FileNotFoundError):
        pass
    warnings.warn(f"{metrics} is damaged: it is restored from the last checkpoint", stacklevel=2)
    return False


def execute(
    config: Experiment,
    out: Path,
    say: Say,
    threads: int,
    workers: int | None = None,
    only: Collection[Job] | None = None,
) -> None:
    """Runs what is left of an experiment, or of some of its runs.

    Several runs go side by side: on a CPU as many as there are cores for, one process each with this many threads; on a
    GPU one at a time unless `workers` says more, which then take turns in one process, see `recipes.turns`.

    Raises:
        Stopped: by SIGINT or SIGTERM, after every run has saved where it stands.
        Failed: a run diverged or broke; the others went on.
        ValueError: fewer than one worker.
    """
    check(config)
    check_workers(workers)
    left = [job for job in (jobs(config) if only is None else only) if not is_done(out, job)]
    if not left:
        return
    device = device_of(config.device)
    on_gpu = device.type != "cpu"
    workers = workers or (1 if on_gpu else min(len(left), max(1, _cores() // threads)))
    if on_gpu and workers > AT_MOST:
        raise ValueError(f"--workers {workers}: at most {AT_MOST} runs go side by side on a GPU")
    processes, turns = (1, workers) if on_gpu else (workers, 1)
    # The data set is packed before several processes want it.
    rehearse(config, load_data(config))
    context = multiprocessing.get_context("spawn")
    stop, queue = Flag(context), context.Queue()
    failures: list[str] = []
    do = functools.partial(_do, config, out)
    with (
        stopping(stop),
        ProcessPoolExecutor(processes, context, start_worker, (stop, queue, threads, os.getpid())) as pool,
    ):
        tasks = [left] if turns > 1 else [[job] for job in left]
        with _signals_held():
            pending = {pool.submit(work, do, task, device, turns): task for task in tasks}
        told = False
        while pending:
            finished, _ = wait(pending, timeout=0.2)
            if stop.is_set() and not told:
                say({"event": "stopping", "job": ""})
                told = True
            while not queue.empty():
                say(queue.get())
            for future in finished:
                task = pending.pop(future)
                try:
                    failures += future.result()
                except Exception as error:  # the process is gone
                    for job in task:
                        if not is_finished(out, job):
                            why = f"{type(error).__name__}: {error}"
                            failures.append(f"{job.name}: {why}")
                            say({"event": "failed", "job": job.name, "why": why})
            if stop.is_set():
                for future in list(pending):
                    if future.cancel():
                        del pending[future]
        while not queue.empty():
            say(queue.get())
    if stop.is_set():
        raise Stopped
    if failures:
        raise Failed.by_reason(failures)


def check_workers(workers: int | None) -> None:
    """ValueError for a number of runs side by side that there cannot be."""
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be 1 or more, not {workers}")


def check(config: Experiment) -> None:
    """What only the whole configuration tells: combinations of pruner, arms and rewinding, and the device."""
    device = device_of(config.device)
    if config.step == "captured" and not can_capture(config, device):
        raise ValueError(
            "--step captured needs a GPU of its own, without torchrun, and no arm with decay-corrected, which follows "
            "every step in Python: "
            "leave --step out, or say --step eager"
        )
    if config.sync_batchnorm and device.type == "cpu":
        raise ValueError(
            "--sync-batchnorm needs a GPU for each process, since torch.nn.SyncBatchNorm does not work on a CPU: "
            "leave it out, and each process normalises its own images"
        )
    if ":" in config.model:
        models.load_factory(config.model)
    for arm in config.arms:
        pruners.check_combination(config.pruner, str(arm), config.rewind, config.cycles)


def load_data(config: Experiment) -> Any:
    """The experiment's data set."""
    share = config.val is None or config.val < 1
    options: dict[str, Any] = {"download": config.download, "val": config.val if share else int(config.val or 0)}
    if config.data_is_folder:
        data = data_sets.load("folder", root=config.data, size=config.image_size, **options)
    else:
        data = data_sets.load(config.data, root=config.data_root, size=config.image_size, **options)
    data = data if config.train_images is None else data.with_train_images(config.train_images)
    return data.non_negative() if config.inputs == "non-negative" else data


def build(config: Experiment, data: Any, seed: int) -> nn.Module:
    """The model at its initial weights, which depend on the seed only."""
    torch.manual_seed(seed)
    return models.create(
        config.model,
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        image_size=data.image_size,
        activation=config.activation,
        width=config.width,
        weights=config.weights,
    )


def rehearse(config: Experiment, data: Any) -> None:
    """One round of the pruner's scores on the untrained model: what cannot work is said before hours of training.

    Raises:
        ValueError: the pruner cannot score this model or remove that much, the model has no such layer, or a batch is
            larger than the training set; the message says why.
    """
    check_batches(config, data)
    if isinstance(config.places, list):
        AP(build(config, data, config.first_seed), where=config.places)
    if all(arm.variant == "solo" for arm in config.arms) or config.pruner.startswith("structured-"):
        return  # which change the model, and look at its groups when they are made
    device = device_of(config.device)
    model = build(config, data, config.first_seed).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a classifier that starts at zero is none any more once it is trained
                parameter.normal_(std=0.02)
    images = data.train.images[:16].to(device)
    batches = [(data.normalise(images), data.train.labels[:16].to(device))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runs will say it
        try:
            pruner = pruners.create(config.pruner)
            pruner.scores(model, Masks(model), batches, nn.functional.cross_entropy)
            if config.pruner == "nm" and config.cycles:  # which removes a fixed share, and says so
                pruner.prune(model, Masks(model), config.amount)
        except (ValueError, TypeError, NotImplementedError) as error:  # the last is torch's, of what has no derivative
            raise ValueError(f"the pruner {config.pruner} cannot prune {config.model}: {error}") from None


def last_network(folder: Path) -> tuple[Experiment, Any, nn.Module, dict[str, Any]]:
    """The last trained network of a run that is done: its configuration, data, the model, and its row."""
    if not (folder / "config.json").exists():
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        like = folder / inside[0] if inside else "runs/quickstart/lite-seed0"
        raise FolderError(f"{folder} is not the folder of a run, such as {like}")
    config, seed = _saved(folder / "config.json", "seed")
    if not (folder / "done.json").exists():
        raise FolderError(f"{folder} is not done yet: python -m recipes resume {shlex.quote(str(folder.parent))}")
    refuse_code_inside(folder.parent, config)
    state = Checkpoints(folder / "checkpoints").latest()
    if state is None:
        raise FolderError(f"{folder} has no checkpoint that can be read")
    data = load_data(config)
    model = build(config, data, seed)
    with state_errors(folder / "checkpoints"):
        fit_(model, state["model"])
    rows = read_rows(folder / "metrics.jsonl")
    check_rows(folder / "metrics.jsonl", rows)
    if not rows:
        raise FolderError(f"{folder / 'metrics.jsonl'} is empty")
    return config, data, model, rows[-1]


@contextmanager
def stopping(stop: Flag | threading.Event, insist: bool = True) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM set the event instead of ending the process; a second SIGINT may end it."""

    def ask(number: int, frame: Any) -> None:
        if insist and stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes begun inside never get SIGINT and SIGTERM, which a terminal sends to all, not even while they import.

    This one gets them afterwards. (What multiprocessing begins by itself, which would let them through, runs already.)
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _do(config: Experiment, out: Path, job: Job, say: Say, stopped: Callable[[], bool]) -> None:
    run(config, out / job.name, job, say, stopped)


def run(config: Experiment, folder: Path, job: Job, say: Say, stopped: Callable[[], bool]) -> None:
    """One run, from where it stands to its end."""
    say = say if distributed.rank() == 0 else say_nothing
    with ExitStack() as held, heard(lambda why: say({"event": "warning", "job": job.name, "why": why})):
        distributed.on_main(lambda: _take(folder, config, job, held))
        data = load_data(config)
        model = build(config, data, job.seed)
        OneRun(config, folder, job, data, model, say, stopped).execute()


def _take(folder: Path, config: Experiment, job: Job, held: ExitStack) -> None:
    refuse_links(folder, folder / "checkpoints", folder / "tensorboard")
    # The experiment's folder is ours: a worker of a killed parent is just ending.
    held.enter_context(locked(folder, patience_s=30))
    if not (folder / "config.json").exists():
        whole = {"schema": SCHEMA, "arm": str(job.arm), "seed": job.seed, "experiment": config.to_dict()}
        write_json(folder / "config.json", whole)


def say_nothing(event: dict[str, Any]) -> None:
    """For callers that want no progress."""


__all__ = ["Failed", "FolderError", "Job", "Stopped", "execute", "is_done", "jobs", "load", "prepare", "rows"]
