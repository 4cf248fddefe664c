"""Writes what was measured into the README, between its markers: an experiment's sentence, the answers' table.

python scripts/readme_results.py runs/quickstart "scripts/run"
python scripts/readme_results.py answers
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from benchmark import machine

from recipes.answers.effect import summary
from recipes.report import of_folder

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    if sys.argv[1] == "answers":
        answers()
    else:
        quickstart(Path(sys.argv[1]), sys.argv[2])


def answers() -> None:
    """The table of docs/results: what AP did at the last density of every network."""
    results = ROOT / "docs" / "results"
    numbers = (json.loads((results / f"{name}.json").read_text()) for name in ("effect", "criteria"))
    table = summary(*numbers).markdown().strip()
    write("answers", f"{table}\n\n![Difference in accuracy by density](docs/images/results/effect.png)")


def write(name: str, text: str) -> None:
    """Puts text between two markers of the README."""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    if f"<!-- {name} -->" not in old:
        raise SystemExit(f"{readme} has no marker <!-- {name} -->")
    new = re.sub(
        f"<!-- {name} -->.*<!-- /{name} -->",
        lambda _: f"<!-- {name} -->\n{text}\n<!-- /{name} -->",
        old,
        flags=re.DOTALL,
    )
    readme.write_text(new, encoding="utf-8")
    print(f"wrote {readme}")


def quickstart(out: Path, command: str) -> None:
    """An experiment's sentence, and its pictures."""
    report = of_folder(out)
    report.save(out)
    picture = ROOT / "docs" / "images" / "quickstart.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "comparison.png", picture)
    shutil.copyfile(out / "layers.png", picture.with_name("quickstart-layers.png"))
    config = report.config
    text = f"""`{command}`, the small question that fits a laptop, gives:

> {report.sentence()}

({config.model} on {config.data}, pruner `{config.pruner}`, {len(config.seed_list)} seeds; {machine()}.)"""
    write("quickstart", text)


if __name__ == "__main__":
    main()
