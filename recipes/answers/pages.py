"""The pages of measured answers, made from their numbers alone: what they say follows from the numbers."""

from __future__ import annotations

import json
from pathlib import Path

from recipes import plots
from recipes.answers import activations, criteria, dead_neurons, depth, effect
from recipes.answers.evidence import Evidence
from recipes.answers.plans import Plan
from recipes.answers.wording import Parts
from recipes.storage import write_whole

MAKERS = {
    "activations": activations.parts,
    "criteria": criteria.parts,
    "dead-neurons": dead_neurons.parts,
    "depth": depth.parts,
    "effect": effect.parts,
    "presets": effect.parts,
    "published": effect.parts,
}


def page(plan: Plan, evidence: Evidence) -> str:
    """The page as Markdown."""
    return _text(plan, evidence, MAKERS[plan.name](evidence))


def _text(plan: Plan, evidence: Evidence, parts: Parts) -> str:
    findings, tables, _ = parts
    machines = {
        f"{machine['cpu']}, one thread a run, torch {machine['torch']}, Python {machine['python']}": None
        for machine in (entry.get("machine", evidence["machine"]) for entry in evidence["folders"].values())
    }
    missing = {name: entry["missing"] for name, entry in evidence["folders"].items() if entry["missing"]}
    absent = [name for name in plan.experiments if name not in evidence["folders"]]
    hours = sum(
        row["train_s"] or 0
        for entry in evidence["folders"].values()
        for seeds in entry["arms"].values()
        for rows in seeds.values()
        for row in rows
    )
    lines = [
        f"# {plan.question}",
        f"**Plan, written before the runs.** {plan.text}",
        "## Answer",
        "\n".join(f"- {finding}" for finding in findings),
        f"![{plan.question}](../images/results/{plan.name}.png)",
        "## What was measured",
        *(table.markdown() for table in tables),
    ]
    if missing or absent:
        gaps = [f"{name} ({n} runs)" for name, n in missing.items()] + absent
        lines.append(f"**Not run** (of what was planned): {', '.join(gaps)}.")
    lines += [
        "## How to make it again",
        f"```\npython -m recipes answer {plan.name} --out RUNS --docs docs            # runs what is left\n"
        f"python -m recipes answer {plan.name} --out RUNS --docs docs --report   # only the page, from the runs\n"
        f"python -m recipes answer {plan.name} --docs docs                       # the same, from its numbers\n```",
        f"{'; '.join(machines)}; "
        f"{hours / 3600:.1f} hours of training, on a machine with other work. ± and brackets are 95 % intervals over "
        "seeds (Student's t), differences are paired by seed, p is of the paired t-test, *detectable* is the "
        "difference that so many pairs show with 80 % power. The whole configuration of every experiment is "
        f"in `{plan.name}.json`.",
    ]
    return "\n\n".join(lines) + "\n"


def write(plan: Plan, evidence: Evidence, docs: Path) -> Path:
    """Writes the page, its picture and its numbers; returns where the page is."""
    from matplotlib.figure import Figure

    results, images = docs / "results", docs / "images" / "results"
    for folder in (results, images):
        folder.mkdir(parents=True, exist_ok=True)
    parts = MAKERS[plan.name](evidence)
    figure = Figure(figsize=(10, 4), layout="constrained")
    parts[2](figure)
    plots.save(figure, images / f"{plan.name}.png")
    write_whole(results / f"{plan.name}.json", json.dumps(evidence, separators=(",", ":")) + "\n")
    write_whole(results / f"{plan.name}.md", _text(plan, evidence, parts))
    return results / f"{plan.name}.md"
