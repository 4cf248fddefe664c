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


def main() -> None:
    out, command = Path(sys.argv[1]), sys.argv[2]
    report = of_folder(out)
    report.save(out)
    picture = ROOT / "docs" / "images" / "quickstart.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "comparison.png", picture)
    shutil.copyfile(out / "layers.png", picture.with_name("quickstart-layers.png"))
    config = report.config
    text = f"""<!-- quickstart -->
`{command}`: {config.model} on {config.data}, pruner `{config.pruner}`, {100 * config.amount:g} % of the weights alive
removed per cycle, {100 * config.rate:g} % of them by AP in `lite`; seeds {config.first_seed} to
{config.first_seed + config.seeds - 1}, mean ± 95 % confidence interval over seeds, test images. Measured on
{machine()}.

{report.markdown()}

{report.sentence()}

![Accuracy, dead-neuron rate and paired differences against density](docs/images/quickstart.png)
<!-- /quickstart -->"""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = re.sub(r"<!-- quickstart -->.*<!-- /quickstart -->", lambda _: text, old, flags=re.DOTALL)
    readme.write_text(new, encoding="utf-8")
    print(f"wrote {readme} and {picture}")


if __name__ == "__main__":
    main()
