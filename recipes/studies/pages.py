"""Results on disk: JSON, tables, the plot, and the page of documentation that is generated from them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from recipes.plots import save
from recipes.storage import write_whole
from recipes.studies.base import Outcome, Table, registered


def write_results(outcome: Outcome, out: Path) -> None:
    """Writes `result.json`, `table.md`, `plot.png` and `page.md`, each whole or not at all."""
    write_whole(out / "result.json", json.dumps(outcome.to_dict(), indent=1) + "\n")
    write_whole(out / "table.md", "\n\n".join(table.markdown() for table in outcome.tables) + "\n")
    _draw(outcome, out / "plot.png")
    write_whole(out / "page.md", page(outcome, "plot.png"))


def write_docs(result: Path, docs: Path) -> Path:
    """Writes `docs/studies/NAME.md` and its picture from a `result.json`, which is kept beside the page."""
    outcome = Outcome.from_dict(json.loads(result.read_text()))
    pages, images = docs / "studies", docs / "images" / "studies"
    write_whole(pages / f"{outcome.study}.json", json.dumps(outcome.to_dict()) + "\n")
    _draw(outcome, images / f"{outcome.study}.png")
    write_whole(pages / f"{outcome.study}.md", page(outcome, f"../images/studies/{outcome.study}.png"))
    write_whole(pages / "index.md", index(pages))
    return pages / f"{outcome.study}.md"


def index(pages: Path) -> str:
    """The page that lists the studies whose results lie in `pages`, with what became of their claims."""
    outcomes = [Outcome.from_dict(json.loads(path.read_text())) for path in sorted(pages.glob("*.json"))]
    rows = []
    for outcome in outcomes:
        counts = Counter(verdict.outcome for verdict in outcome.verdicts)
        tally = ", ".join(f"{n} {text}" for text, n in counts.items())
        rows.append([f"[{registered()[outcome.study].title}]({outcome.study}.md)", tally])
    table = Table("Each page has the claim, the setting, the numbers and the command.", ["study", "claims"], rows)
    names = "\n".join(outcome.study for outcome in outcomes)
    return (
        f"# Studies\n\nWhat papers claim about activations, dead neurons and initialisation, rebuilt and checked at a "
        f'size that a laptop can run. Verdicts follow the numbers; "not reproduced at this scale" says that '
        f"these runs do not show it, not that it is false.\n\n{table.markdown()}\n\n"
        f"```{{toctree}}\n:hidden:\n\n{names}\n```\n"
    )


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


def _draw(outcome: Outcome, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    registered()[outcome.study].plot(outcome.data, figure)
    save(figure, path)
