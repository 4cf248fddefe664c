"""What every study is: options, a measurement, and tables, verdicts and a plot that follow from its numbers alone."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch

from recipes.studies.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 1
Data = dict[str, Any]
REPRODUCED = "reproduced"
NOT_SHOWN = "not reproduced at this scale"
OPPOSITE = "the opposite was measured"


@dataclass(frozen=True)
class Table:
    """A title, column names, and rows of text or numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [list(self.columns), ["---"] * len(self.columns), *self.rows]
        body = "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)
        return f"{self.title}\n\n{body}"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", "\\|")


@dataclass(frozen=True)
class Verdict:
    """A claim, what became of it here, and the numbers that say so."""

    claim: str
    outcome: str
    evidence: str


def check(claim: str, holds: bool, evidence: str) -> Verdict:
    """The verdict on a claim that the numbers settle either way."""
    return Verdict(claim, REPRODUCED if holds else NOT_SHOWN, evidence)


def above(claim: str, difference: Interval, evidence: str, bound: float = 0.0) -> Verdict:
    """The verdict on "the difference is above `bound`": reproduced only when its whole interval is.

    >>> above("a > b", Interval(1.0, -0.5, 2.5, 3), "").outcome
    'not reproduced at this scale'
    """
    if difference.low > bound:
        return Verdict(claim, REPRODUCED, evidence)
    return Verdict(claim, OPPOSITE if difference.high < bound else NOT_SHOWN, evidence)


class Journal:
    """The parts of a measurement that are done, a line of JSON each: a study that was killed goes on from there.

    The first line holds the configuration; a journal of another one is refused.
    """

    def __init__(self, path: Path | None, config: Data) -> None:
        self.path = path
        self.done: dict[str, Any] = {}
        self.seconds_before = 0.0
        if path is None:
            return
        head = {"schema": SCHEMA, "config": json.loads(json.dumps(config, default=str))}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A line without its end is one that a kill cut short: it is measured again.
        whole = [line for line in lines if line.endswith("\n")]
        if not whole:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(head) + "\n")
            return
        if json.loads(whole[0]) != head:
            raise ValueError(f"{path} belongs to another configuration of this study: choose another --out")
        if len(whole) != len(lines):
            path.write_text("".join(whole))
        for line in whole[1:]:
            entry = json.loads(line)
            self.done[entry["key"]] = entry["value"]
            self.seconds_before += entry["seconds"]

    def cell(self, key: str, measure: Callable[..., Any], *args: Any) -> Any:
        """What `measure(*args)` returns, or what it returned before the study was interrupted."""
        if key not in self.done:
            started = time.perf_counter()
            value = json.loads(json.dumps(measure(*args)))  # what a resumed study would see, at once
            entry = {"key": key, "value": value, "seconds": round(time.perf_counter() - started, 3)}
            self.done[key] = value
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
        return self.done[key]


S = TypeVar("S", bound="type[Study]")
_studies: dict[str, type[Study]] = {}


@dataclass(frozen=True, kw_only=True)
class Study(ABC):
    """A study's options are its fields; `measure` computes, the rest only presents what was computed."""

    name: ClassVar[str]
    title: ClassVar[str]
    claim: ClassVar[str]
    setting: ClassVar[str]

    seed: int = 0
    """The first seed; trials use this one and the ones that follow."""

    @classmethod
    def quick(cls, **options: Any) -> Self:
        """A version that takes less than a minute on two cores."""
        return cls(**options)

    @abstractmethod
    def measure(self, journal: Journal) -> Data:
        """All numbers, in plain types."""

    @classmethod
    @abstractmethod
    def tables(cls, data: Data) -> list[Table]:
        """The numbers as tables."""

    @classmethod
    @abstractmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        """What the numbers say about the claims."""

    @classmethod
    @abstractmethod
    def plot(cls, data: Data, figure: Figure) -> None:
        """The numbers as a picture."""


def register(name: str) -> Callable[[S], S]:
    """Makes a study available under a name."""

    def add(study: S) -> S:
        study.name = name
        _studies[name] = study
        return study

    return add


def registered() -> dict[str, type[Study]]:
    """All studies by name."""
    return dict(_studies)


@dataclass(frozen=True)
class Outcome:
    """A finished study: everything that `result.json` holds."""

    study: str
    config: Data
    data: Data
    tables: list[Table]
    verdicts: list[Verdict]
    command: str = ""
    machine: Data = field(default_factory=dict)
    time_s: float = 0.0
    schema: int = SCHEMA

    def to_dict(self) -> Data:
        """In plain types, as written to `result.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Data) -> Outcome:
        """Reads what `to_dict` wrote; tables and verdicts are computed anew from its data."""
        if stored.get("schema") != SCHEMA:
            raise ValueError(f"not a study result of schema {SCHEMA}: schema {stored.get('schema')!r}")
        if stored.get("study") not in _studies:
            raise ValueError(f"a result of an unknown study: {stored.get('study')!r}")
        kind = _studies[stored["study"]]
        data = stored["data"]
        kept = {key: stored[key] for key in ("study", "config", "command", "machine", "time_s")}
        return cls(**kept, data=data, tables=kind.tables(data), verdicts=kind.verdicts(data))

    def __str__(self) -> str:
        parts = [f"{self.study}, {self.time_s:.0f} s", *(table.markdown() for table in self.tables)]
        parts.append("\n".join(f"{v.outcome.upper()}: {v.claim} ({v.evidence})" for v in self.verdicts))
        return "\n\n".join(parts)


def execute(study: Study, out: Path | None = None, command: str = "") -> Outcome:
    """Runs a study; with `out`, what was measured before in that folder is kept, and the results are written there."""
    started = time.perf_counter()
    config = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(study).items()}
    journal = Journal(out / "journal.jsonl" if out else None, {"study": study.name, **config})
    with torch.random.fork_rng():
        torch.manual_seed(study.seed)
        data = json.loads(json.dumps(study.measure(journal)))
    # Of all sittings together: a study that was resumed must not look faster than it was.
    seconds = journal.seconds_before + time.perf_counter() - started
    outcome = Outcome(
        study=study.name,
        config=json.loads(json.dumps(config)),
        data=data,
        tables=study.tables(data),
        verdicts=study.verdicts(data),
        command=command,
        machine=machine(),
        time_s=round(seconds, 1),
    )
    if out is not None:
        from recipes.studies.pages import write_results

        write_results(outcome, out)
    return outcome


def machine() -> Data:
    """What the numbers were computed on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": sys.platform,
    }
