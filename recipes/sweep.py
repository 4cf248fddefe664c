"""Grids of experiments: every pruner × activation × … asked for, as independent runs that any scheduler can spread.

Each experiment has its own folder, named after what it is: a sweep can grow, and its tasks share nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes import experiment, models
from recipes.config import Experiment, Job
from recipes.storage import FolderError

AXES = ("model", "data", "pruner", "activation", "rewind", "rate")


@dataclass(frozen=True)
class Task:
    """One run of one of the experiments."""

    folder: Path
    config: Experiment
    job: Job

    @property
    def name(self) -> str:
        """Where it is, below the sweep's folder."""
        return f"{self.folder.name}/{self.job.name}"


def experiments(base: Experiment, values: Mapping[str, Sequence[Any]], out: Path) -> dict[Path, Experiment]:
    """Every combination of the values, by the folder it goes to.

    Args:
        base: what they have in common.
        values: for some of `AXES`, the values to take.
        out: the sweep's folder.

    Raises:
        ValueError: a value that an experiment does not take, a combination that makes no sense, or one given twice.

    >>> grid = experiments(Experiment(), {"pruner": ["lamp", "synflow"], "activation": ["relu", "gelu"]}, Path("runs"))
    >>> [str(folder) for folder in grid][:3]
    ['runs/cnn-digits-lamp-relu', 'runs/cnn-digits-lamp-gelu', 'runs/cnn-digits-synflow-relu']
    """
    axes = [axis for axis in AXES if axis in values]
    found: dict[Path, Experiment] = {}
    for combination in itertools.product(*(values[axis] for axis in axes)):
        chosen = dict(zip(axes, combination, strict=True))
        config = replace(base, **chosen)
        if config.activation is None:  # said outright, so that naming it later is the same experiment
            config = replace(config, activation=models.default_activation(config.model))
        folder = out / _name(config, base)
        if folder in found:
            raise ValueError(f"two experiments of the sweep would be {folder.name}: is a value given twice?")
        try:
            experiment.check(config)
        except ValueError as error:
            raise ValueError(f"{folder.name}: {error}") from None
        found[folder] = config
    return found


def _name(config: Experiment, base: Experiment) -> str:
    data = Path(config.data).resolve().name if config.data_is_folder else config.data
    parts = [config.model, data, config.pruner, config.activation or "own"]
    # Only where they are not the preset's: a sweep that is later made over them too keeps its folders.
    parts += [f"rewind-{config.rewind}"] if config.rewind != base.rewind else []
    parts += [f"rate-{config.rate:g}"] if config.rate != base.rate else []
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-") for part in parts)


def tasks(grid: Mapping[Path, Experiment]) -> list[Task]:
    """All runs, the seeds outermost: a sweep cut short is paired, and one given more seeds keeps its numbers."""
    first = next(iter(grid.values()))
    return [
        Task(folder, config, job)
        for seed in first.seed_list
        for folder, config in grid.items()
        for job in experiment.jobs(config)
        if job.seed == seed
    ]


def folders(out: Path) -> list[Path]:
    """The folders of experiments that `out` stands for: itself, or those of a sweep in it.

    Raises:
        FolderError: it is neither.
    """
    if (out / "experiment.json").exists():
        return [out]
    inside = sorted(path.parent for path in out.glob("*/experiment.json"))
    if not inside:
        raise FolderError(f"{out / 'experiment.json'} is missing: {out} is not the folder of an experiment or a sweep")
    return inside
