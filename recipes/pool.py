"""Several experiments in one comparison: seeds of the same one pooled, a table a pruner, one correction over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes import experiment, plots
from recipes.config import SCHEMA, Experiment, Job
from recipes.report import Report, Rows, correct, paragraphs, write_csv
from recipes.storage import FolderError, write_json, write_whole

# What may differ between folders whose runs are pooled; everything else makes another experiment.
_FREE = ("ap", "seeds", "first_seed", "data_root", "download", "threads", "monitor_every")
_NAMED = ("pruner", "model", "data", "activation", "rewind", "rate")


class Pool:
    """Experiments compared together.

    Holm's correction goes over all their comparisons, so that looking at many does not make differences out of chance.

    Args:
        folders: those of the experiments. Folders of the same configuration, but for arms and seeds, become one.

    Attributes:
        reports: one an experiment, ordered by pruner.

    Raises:
        FolderError: a run is in two folders, or a folder is not an experiment's.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        groups: dict[str, list[Path]] = {}
        for folder in folders:
            config = experiment.load(folder)
            free = {name: getattr(Experiment(), name) for name in _FREE}
            groups.setdefault(repr(replace(config, **free)), []).append(folder)
        found = [self._report(group) for group in groups.values()]
        self.reports = sorted(found, key=lambda report: report.config.pruner)
        correct([cell for report in self.reports for cell in report.cells])

    @staticmethod
    def _report(folders: list[Path]) -> Report:
        where: dict[Job, Path] = {}
        rows: dict[Job, Rows] = {}
        configs = [experiment.load(folder) for folder in folders]
        for folder, config in zip(folders, configs, strict=True):
            for job, its in experiment.rows(folder, config).items():
                if job in where:
                    raise FolderError(f"{job.name} is both in {where[job]} and in {folder}: leave one of them out")
                where[job], rows[job] = folder, its
        arms = tuple(dict.fromkeys(arm for config in configs for arm in config.ap))
        seeds = {seed for config in configs for seed in config.seed_list}
        return Report(replace(configs[0], ap=arms, first_seed=min(seeds), seeds=len(seeds)), rows)

    @property
    def comparisons(self) -> int:
        """How many comparisons of accuracy the correction goes over."""
        return sum(
            cell["cycle"] > 0 and (d := cell["accuracy_difference"]) is not None and d.p is not None
            for report in self.reports
            for cell in report.cells
        )

    def label(self, report: Report, *without: str) -> str:
        """What tells an experiment from the others."""
        values = {name: {str(getattr(r.config, name)) for r in self.reports} for name in _NAMED}
        config = report.config
        parts = [f"{config.model} on {config.data}"]
        for name, text in (
            ("pruner", config.pruner),
            ("activation", str(config.activation or "own activation")),
            ("rewind", f"rewind {config.rewind}"),
            ("rate", f"rate {config.rate:g}"),
        ):
            parts += [text] if len(values[name]) > 1 and name not in without else []
        return ", ".join(parts)

    def note(self) -> str:
        """What the corrected p-values are corrected for."""
        return (
            f"Holm's correction goes over all {self.comparisons} comparisons of accuracy in these "
            f"{len(self.reports)} experiments."
        )

    def __str__(self) -> str:
        parts, last = [], None
        for report in self.reports:
            if report.config.pruner != last:
                last = report.config.pruner
                parts.append(f"=== pruner {last} ===")
            parts += [f"{self.label(report, 'pruner')}\n{report.table()}", report.sentence()]
        return "\n\n".join([*parts, self.note()])

    def markdown(self) -> str:
        """A section a pruner, in it a table and a sentence an experiment."""
        parts, last = [], None
        for report in self.reports:
            if report.config.pruner != last:
                last = report.config.pruner
                parts.append(f"## `{last}`")
            parts += [f"**{self.label(report, 'pruner')}**", report.markdown(), paragraphs(report.sentence())]
        return "\n\n".join([*parts, self.note()]) + "\n"

    def records(self) -> list[dict[str, Any]]:
        """Flat rows, one an experiment, arm and density, with what tells the experiments apart."""
        return [
            {name: getattr(report.config, name) for name in _NAMED} | row
            for report in self.reports
            for row in report.records()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        return {
            "schema": SCHEMA,
            "comparisons": self.comparisons,
            "experiments": [report.to_dict() for report in self.reports],
        }

    def save(self, out: Path) -> list[Path]:
        """Writes the plot, summary.csv, summary.md and at last summary.json; returns what to look at."""
        pictures = [plots.differences(self, out / "differences.png")]
        write_csv(out / "summary.csv", self.records())
        write_whole(out / "summary.md", self.markdown())
        write_json(out / "summary.json", self.to_dict())
        return pictures
