"""Writes an experiment's table, sentence and figure into the README, between its markers.

python scripts/readme_results.py runs/quickstart "scripts/run"
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from benchmark import machine

from recipes.report import of_folder

ROOT = Path(__file__).resolve().parent.parent


def percent(share: float) -> str:
    """
    >>> percent(0.04)
    '4 %'
    """
    return f"{100 * share:.3g} %"


def main() -> None:
    out, command = Path(sys.argv[1]), sys.argv[2]
    report = of_folder(out)
    report.save(out)
    picture = ROOT / "docs" / "images" / "quickstart.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "comparison.png", picture)
    shutil.copyfile(out / "layers.png", picture.with_name("quickstart-layers.png"))
    config = report.config
    seeds = config.seed_list
    text = f"""<!-- quickstart -->
`{command}`, the small question that fits a laptop, gives:

> {report.sentence()}

{config.model} on {config.data}, pruner `{config.pruner}`; each cycle removes {percent(config.amount)} of the weights
alive, in `lite` {percent(config.amount - config.rate)} by the pruner and {percent(config.rate)} by AP. Seeds {seeds[0]}
to {seeds[-1]},
mean ± 95 % confidence interval over seeds, test images; Δ is the paired difference. DNR: dead-neuron rate.
Measured on {machine()}.

{report.markdown()}
<!-- /quickstart -->"""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = re.sub(r"<!-- quickstart -->.*<!-- /quickstart -->", lambda _: text, old, flags=re.DOTALL)
    readme.write_text(new, encoding="utf-8")
    print(f"wrote {readme} and {picture}")


if __name__ == "__main__":
    main()
