"""Results on disk: JSON, tables, the plot, and the page of documentation that is generated from them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from recipes.studies.base import Outcome, registered


def write_results(outcome: Outcome, out: Path) -> None:
    """Writes `result.json`, `table.md`, `plot.png` and `page.md`, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "result.json", json.dumps(outcome.to_dict(), indent=1) + "\n")
    _write(out / "table.md", "\n\n".join(table.markdown() for table in outcome.tables) + "\n")
    _draw(outcome, out / "plot.png")
    _write(out / "page.md", page(outcome, "plot.png"))


def write_docs(result: Path, docs: Path) -> Path:
    """Writes `docs/studies/NAME.md` and its picture from a `result.json`, which is kept beside the page."""
    outcome = Outcome.from_dict(json.loads(result.read_text()))
    pages, images = docs / "studies", docs / "images" / "studies"
    pages.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    _write(pages / f"{outcome.study}.json", json.dumps(outcome.to_dict()) + "\n")
    _draw(outcome, images / f"{outcome.study}.png")
    _write(pages / f"{outcome.study}.md", page(outcome, f"../images/studies/{outcome.study}.png"))
    return pages / f"{outcome.study}.md"


def page(outcome: Outcome, picture: str) -> str:
    """The page as Markdown: claim, setting, what was measured, verdict, and how to make it again."""
    study = registered()[outcome.study]
    machine = outcome.machine
    verdicts = "\n".join(f"- **{v.outcome}**: {v.claim} ({v.evidence})" for v in outcome.verdicts)
    options = ", ".join(f"{key} = {value}" for key, value in outcome.config.items())
    parts = [
        f"# {study.title}",
        f"**Claim.** {study.claim}",
        f"**Setting.** {study.setting}",
        f"Options: {options}.",
        "## Verdict",
        verdicts,
        "## What was measured",
        f"![{study.title}]({picture})",
        *(table.markdown() for table in outcome.tables),
        "## How to make it again",
        f"```\n{outcome.command or f'python -m recipes study {outcome.study} --out DIR'}\n```",
        f"{outcome.time_s:.0f} s on {machine.get('cpu')}, {machine.get('threads')} threads, "
        f"torch {machine.get('torch')}, Python {machine.get('python')}. Every number on this page, the verdicts "
        f"included, is computed from `{outcome.study}.json`. Intervals are 95 %.",
    ]
    return "\n\n".join(parts) + "\n"


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def _draw(outcome: Outcome, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    registered()[outcome.study].plot(outcome.data, figure)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=110)
    os.replace(part, path)
