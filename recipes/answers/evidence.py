"""What the runs of a plan measured, taken out of their folders, in one JSON file that its page is made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes import experiment
from recipes.answers.plans import Plan
from recipes.config import Arm, Experiment
from recipes.experiment import Job
from recipes.report import MEASURES, Report, Rows
from recipes.storage import FolderError
from recipes.studies.base import machine

SCHEMA = 1
KEPT = ("cycle", "alive", "density", *MEASURES, "trainings", "shortfall", "train_s")
Evidence = dict[str, Any]


def gather(plan: Plan, runs: Path, published: Evidence | None = None) -> Evidence:
    """Reads the folders of a plan below `runs`; an experiment that has no finished run there stays as it was published.

    Runs that are not there are left out, and their number is kept: a page says what is missing.

    Raises:
        FolderError: nothing is there, or a folder holds another experiment than the plan's.
    """
    folders: dict[str, Any] = {}
    here = machine()
    for name in (*plan.experiments, *plan.reuses):
        out = runs / name
        if not (out / "experiment.json").exists():
            continue
        config = experiment.load(out)
        planned = plan.experiments.get(name)
        if planned is not None and replace(config, ap=planned.ap, seeds=planned.seeds) != planned:
            raise FolderError(f"{out} holds another experiment than the plan {plan.name}")
        wanted = config if planned is None else planned
        arms: dict[str, dict[str, Rows]] = {}
        found = experiment.rows(out, wanted)
        for job, rows in found.items():
            if experiment.is_finished(out, job):
                short = [{key: _short(row.get(key)) for key in KEPT} for row in rows]
                arms.setdefault(str(job.arm), {})[str(job.seed)] = short
        done = sum(len(seeds) for seeds in arms.values())
        if done:
            folders[name] = {
                "experiment": wanted.to_dict(),
                "machine": here,
                "arms": arms,
                "missing": len(experiment.jobs(wanted)) - done,
                "over_steps": _over_steps(out, wanted) if plan.name == "dead-neurons" else {},
            }
    if not folders:
        raise FolderError(f"{runs} has no finished run of the plan {plan.name}: run it first")
    if published is not None:
        kept = {name: {"machine": published["machine"], **entry} for name, entry in published["folders"].items()}
        folders = {name: (kept | folders)[name] for name in (*plan.experiments, *plan.reuses) if name in kept | folders}
    return {"schema": SCHEMA, "plan": plan.name, "machine": here, "folders": folders}


def _short(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _over_steps(out: Path, config: Experiment) -> dict[str, list[list[float]]]:
    """For the runs of `none`: [step of all trainings together, total, static] of each epoch's training passes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[list[float]]] = {}
    for seed in config.seed_list:
        folder = out / Job(Arm.parse("none"), seed).name / "tensorboard"
        if not folder.exists():
            continue
        events = EventAccumulator(str(folder))
        events.Reload()
        tags = [f"dnr/train/model/{rate}" for rate in ("total", "static")]
        if all(tag in events.Tags()["scalars"] for tag in tags):
            total, static = (events.Scalars(tag) for tag in tags)
            found[str(seed)] = [
                [a.step, round(a.value, 5), round(b.value, 5)] for a, b in zip(total, static, strict=True)
            ]
    return found


def report_of(evidence: Evidence, folder: str, baseline: str | None = None) -> Report:
    """The paired report of one folder; with `baseline`, arms are compared with the `none` of that other folder."""
    entry = evidence["folders"][folder]
    config = Experiment.from_dict(entry["experiment"])
    rows = _jobs(entry)
    if baseline is not None:
        rows |= {job: its for job, its in _jobs(evidence["folders"][baseline]).items() if str(job.arm) == "none"}
        rows = {job: its for job, its in rows.items() if job.seed in config.seed_list}
        config = replace(config, ap=("none", *config.ap))
    return Report(config, rows)


def _jobs(entry: dict[str, Any]) -> dict[Job, Rows]:
    return {
        Job(Arm.parse(arm), int(seed)): rows for arm, seeds in entry["arms"].items() for seed, rows in seeds.items()
    }
