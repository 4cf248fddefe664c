"""What an experiment found: tables, a sentence, files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from recipes import experiment, plots
from recipes.config import SCHEMA, Experiment
from recipes.statistics import Mean, Paired, holm, mean_of, paired
from recipes.storage import FolderError, write_json, write_whole

MARGIN = 0.005  # of the equivalence test: half a percentage point of accuracy
MEASURES = (
    "accuracy",
    "val_accuracy",
    "dnr_total",
    "dnr_static",
    "dnr_dynamic",
    "effective_density",
    "negative_share",
    "overlap_smallest_negative",
    "overlap_pruner",
)
Rows = list[dict[str, Any]]


def baseline_of(arm: str, arms: Sequence[str]) -> str | None:
    """What an arm is compared with: pro with pro:pruner, which has its budget, if that was run; else with none.

    >>> baseline_of("pro", ["none", "pro", "pro:pruner"]), baseline_of("lite", ["none", "lite"])
    ('pro:pruner', 'none')
    """
    if arm.startswith("pro") and arm != "pro:pruner" and "pro:pruner" in arms:
        return "pro:pruner"
    return "none" if arm != "none" and "none" in arms else None


def correct(cells: Sequence[dict[str, Any]]) -> None:
    """Holm's correction over all comparisons after a pruning (the dense networks are the same), in place."""
    for measure in ("accuracy_difference", "dnr_total_difference"):
        compared = [cell for cell in cells if cell[measure] is not None and cell["cycle"] > 0]
        for cell, p in zip(compared, holm([cell[measure].p for cell in compared]), strict=True):
            cell[measure] = replace(cell[measure], p_holm=p)


class Report:
    """The rows of an experiment, put together over seeds and compared pair by pair.

    Args:
        config: the experiment.
        found: the rows of each run.

    Attributes:
        cells: one for each arm and cycle: means over seeds, and the paired comparisons with its baseline.
    """

    def __init__(self, config: Experiment, found: dict[experiment.Job, Rows]) -> None:
        self.config = config
        self.arms = [str(arm) for arm in config.arms]
        self.by_arm: dict[str, dict[int, Rows]] = {arm: {} for arm in self.arms}
        for job, rows in found.items():
            if rows:
                self.by_arm[str(job.arm)][job.seed] = rows
        if not any(self.by_arm.values()):
            raise FolderError("no trained network has been recorded yet")
        self.cells = [self._cell(arm, cycle) for cycle in range(config.cycles + 1) for arm in self.arms]
        self.cells = [cell for cell in self.cells if cell["seeds"]]
        correct(self.cells)

    def _row(self, arm: str, seed: int, cycle: int) -> dict[str, Any] | None:
        rows = self.by_arm[arm].get(seed, [])
        return rows[cycle] if cycle < len(rows) else None

    def _cell(self, arm: str, cycle: int) -> dict[str, Any]:
        rows = {seed: row for seed in self.by_arm[arm] if (row := self._row(arm, seed, cycle)) is not None}
        first = next(iter(rows.values()), {})
        cell: dict[str, Any] = {"arm": arm, "cycle": cycle, "seeds": sorted(rows), "density": first.get("density")}
        cell["trainings"] = first.get("trainings")
        cell["shortfall"] = sum(row.get("shortfall", 0) > 0 for row in rows.values())
        for measure in MEASURES:
            values = [row[measure] for row in rows.values() if row.get(measure) is not None]
            cell[measure] = mean_of(values) if values else None
        base = baseline_of(arm, self.arms)
        cell["baseline"] = base
        for measure in ("accuracy", "dnr_total"):
            pairs = []
            for seed, row in rows.items():
                other = self._row(base, seed, cycle) if base else None
                comparable = other is not None and row.get(measure) is not None and other.get(measure) is not None
                if comparable and other is not None and row["alive"] == other["alive"]:
                    pairs.append((row[measure], other[measure]))
            cell[f"{measure}_difference"] = (
                paired([a for a, _ in pairs], [b for _, b in pairs], MARGIN) if pairs else None
            )
        return cell

    def sentence(self) -> str:
        """What is shown, and what is not: a line an arm."""
        parts = []
        for arm in self.arms:
            cells = [
                c for c in self.cells if c["arm"] == arm and c["cycle"] > 0 and c["accuracy_difference"] is not None
            ]
            if not cells:
                continue
            base = cells[0]["baseline"]
            parts.append(f"{arm} against {base}: " + self._verdict(cells))
        if not parts:
            return self._nothing()
        return "\n".join(parts)

    def _nothing(self) -> str:
        """Why there is no comparison."""
        bases = {arm: base for arm in self.arms if (base := baseline_of(arm, self.arms))}
        if not bases:
            return "Nothing is compared: that takes an arm and its baseline, none (or pro:pruner for pro)."
        pruned = [(arm, seed) for arm, base in bases.items() for seed in self.by_arm[arm] if self._row(base, seed, 1)]
        if not any(self._row(arm, seed, 1) for arm, seed in pruned):
            return "Nothing is compared: no seed has a pruned network in an arm and in its baseline."
        return (
            "Nothing is compared: the arms never have the same number of weights left. Structured pruners remove "
            "channels, which hold different numbers of them."
        )

    def _verdict(self, cells: list[dict[str, Any]]) -> str:
        differences = [cell["accuracy_difference"] for cell in cells]
        if differences[0].n < 2:
            found = _from_to([d.difference for d in differences], 2)
            return f"accuracy differs by {found} points with a single seed, which shows nothing."
        tested = [d for d in differences if d.p is not None]
        shown = [
            c for c in cells if c["accuracy_difference"].p_holm is not None and c["accuracy_difference"].p_holm < 0.05
        ]
        texts = []
        for sign, word in ((1, "better"), (-1, "worse")):
            at = [c for c in shown if sign * c["accuracy_difference"].difference > 0]
            if at:
                ranges = ", ".join(
                    f"{100 * c['accuracy_difference'].difference:+.2f} at {c['density']:.1%}" for c in at
                )
                texts.append(f"accuracy is {word} at {len(at)} of {_densities(cells)} ({ranges} of the weights)")
        equal = [c for c in cells if c["accuracy_difference"].equivalent]
        if not texts:
            texts.append("no difference in accuracy shown at any density")
        if equal:
            texts.append(f"equivalent within ±{100 * MARGIN:g} points at {len(equal)} of {len(cells)}")
        seen = [100 * d.detectable for d in tested if d.detectable is not None] or [0.0]
        among = f" (the median over densities; {max(seen):.2f} at worst)" if len(seen) > 1 else ""
        texts.append(f"with {differences[0].n} seeds a difference below {median(seen):.2f} points{among} can be missed")
        dnr = [c["dnr_total_difference"] for c in cells if c["dnr_total_difference"] is not None]
        if dnr:
            lower = sum(d.p_holm is not None and d.p_holm < 0.05 and d.difference < 0 for d in dnr)
            texts.append(
                f"the dead-neuron rate changes by {_from_to([d.difference for d in dnr], 1)} points, shown to be lower "
                f"at {lower} of {_densities(dnr)}"
            )
        return "; ".join(texts) + "."

    def table(self) -> str:
        """For a terminal: one line an arm and density, 100 columns wide where arms have short names."""
        wide = max(14, *map(len, self.arms))
        lines = [
            f"{'density':>8}  {'arm':<{wide}} {'seeds':>5}  {'accuracy %':>14}  {'DNR total %':>14}  {'static %':>8}  "
            f"{'Δ accuracy':>15}  {'Holm p':>6}"
        ]
        last = None
        for cell in self.cells:
            density = f"{cell['density']:.1%}"
            d = cell["accuracy_difference"]
            change, p = ("", "")
            if d is not None and cell["cycle"]:
                change = points(d)
                p = "" if d.p_holm is None else f"{d.p_holm:.3f}"
            static = cell["dnr_static"]
            lines.append(
                f"{density if density != last else '':>8}  {cell['arm']:<{wide}} {len(cell['seeds']):>5}  "
                f"{percent(cell['accuracy']):>14}  {percent(cell['dnr_total']):>14}  "
                f"{'' if static is None else f'{100 * static.mean:.2f}':>8}  {change:>15}  {p:>6}"
                + ("  ran out of candidates" if cell["shortfall"] else "")
            )
            last = density
        return "\n".join(line.rstrip() for line in lines)

    def markdown(self) -> str:
        """The same as a Markdown table."""
        head = ["density", "arm", "seeds", "accuracy %", "DNR total %", "static %", "effective density %", "Δ accuracy"]
        lines = ["| " + " | ".join(head) + " |", "|" + " --: |" * len(head)]
        for cell in self.cells:
            d = cell["accuracy_difference"]
            change = ""
            if d is not None and cell["cycle"]:
                change = points(d)
            values = [f"{cell['density']:.1%}", f"`{cell['arm']}`", str(len(cell["seeds"]))]
            values += [percent(cell[m]) for m in ("accuracy", "dnr_total", "dnr_static", "effective_density")]
            lines.append("| " + " | ".join([*values, change]) + " |")
        return "\n".join(lines)

    def records(self) -> list[dict[str, Any]]:
        """Flat rows, one an arm and density, that `pandas.DataFrame` takes as they are."""
        flat = []
        for cell in self.cells:
            row: dict[str, Any] = {}
            for key, value in cell.items():
                if isinstance(value, (Mean, Paired)):
                    row |= {f"{key}_{k}" if k != "mean" else key: v for k, v in asdict(value).items()}
                elif key == "seeds":
                    row["seeds"] = len(value)
                else:
                    row[key] = value
            flat.append(row)
        columns = list(dict.fromkeys(key for row in flat for key in row))
        return [{key: row.get(key) for key in columns} for row in flat]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        return {
            "schema": SCHEMA,
            "experiment": self.config.to_dict(),
            "sentence": self.sentence(),
            "cells": self.records(),
        }

    def save(self, out: Path) -> list[Path]:
        """Writes the plots, summary.csv, summary.md and at last summary.json; returns what to look at."""
        pictures = plots.draw(self, out)
        write_csv(out / "summary.csv", self.records())
        write_whole(out / "summary.md", f"{paragraphs(self.sentence())}\n\n{self.markdown()}\n")
        write_json(out / "summary.json", self.to_dict())
        return pictures

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.sentence()}"


def of_folder(out: Path) -> Report:
    """The report of an experiment's folder, finished or not."""
    config = experiment.load(out)
    return Report(config, experiment.rows(out, config))


def paragraphs(text: str) -> str:
    """Lines for Markdown, which would run them together."""
    return text.replace("\n", "\n\n")


def _from_to(shares: Sequence[float], digits: int) -> str:
    """The range of some differences, in percentage points.

    >>> _from_to([-0.01, 0.02], 1), _from_to([0.02], 1)
    ('-1.0 to +2.0', '+2.0')
    """
    low, high = (f"{100 * value:+.{digits}f}" for value in (min(shares), max(shares)))
    return low if low == high else f"{low} to {high}"


def _densities(found: Sequence[object]) -> str:
    return f"{len(found)} densit{'y' if len(found) == 1 else 'ies'}"


def percent(value: Mean | None, digits: int = 2) -> str:
    """A rate in percent with its interval, as tables show it.

    >>> percent(Mean(3, 0.5, 0.0125)), percent(None)
    ('50.00 ± 1.25', '–')
    """
    return "–" if value is None else f"{100 * value.mean:.{digits}f}" + _interval(value.half_width, digits)


def points(value: Paired) -> str:
    """A difference in percentage points with its interval."""
    return f"{100 * value.difference:+.2f}" + _interval(value.half_width, 2)


def _interval(half_width: float | None, digits: int) -> str:
    return "" if half_width is None else f" ± {100 * half_width:.{digits}f}"


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Flat rows as CSV, with the columns of all of them and the schema's version in each."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*dict.fromkeys(key for row in records for key in row), "schema"])
    writer.writeheader()
    writer.writerows(record | {"schema": SCHEMA} for record in records)
    write_whole(path, text.getvalue())
