"""The page of the plan `depth`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recipes import plots
from recipes.answers.evidence import Evidence, report_of
from recipes.answers.wording import Parts, compared, listed, p_text, pointed
from recipes.plots import COLOURS
from recipes.report import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINES = {"depth-criteria": "headline-vgg", "headline-vgg": None, "depth-batchnorm": None}


def parts(evidence: Evidence) -> Parts:
    """Findings, tables and what draws the picture."""
    cells: list[tuple[str, dict[str, Any]]] = []
    for folder, baseline in BASELINES.items():
        if folder in evidence["folders"]:
            report = report_of(evidence, folder, baseline)
            network = "with BatchNorm" if folder == "depth-batchnorm" else "without BatchNorm"
            cells += [(network, c) for c in report.cells if _shown(folder, c["arm"]) and c["cycle"]]
    cells = [(network, c) for network, c in cells if c["accuracy_difference"] is not None]
    tables = []
    for cycle in sorted({c["cycle"] for _, c in cells}):
        rows = [([network], c) for network, c in cells if c["cycle"] == cycle]
        title = f"VGG-11 × 1/8 at {rows[0][1]['density']:.1%} of the weights, against none"
        tables.append(compared(rows, title, ["network"]))
    first = [(network, c) for network, c in cells if c["cycle"] == 1]
    findings = []
    for network, c in first:
        d = c["accuracy_difference"]
        findings.append(
            f"{network}, {listed([c['arm']])}: {pointed(d)} points at {c['density']:.1%} of the weights "
            f"(p {p_text(d.p_holm)}, {d.n} seeds), "
            f"to {percent(c['accuracy'], 1)} %; dead-neuron rate {pointed(c['dnr_total_difference'])}."
        )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        curves = dict.fromkeys((network, c["arm"]) for network, c in cells)
        for i, (network, arm) in enumerate(curves):
            its = [c for n, c in cells if (n, c["arm"]) == (network, arm)]
            label = f"{listed([arm]).strip('`')}, {network}"
            colour = COLOURS[i % len(COLOURS)]
            plots.difference(axes, its, "accuracy_difference", colour, label, beside=1 + 0.02 * i)
        plots.dress(axes, "")
        axes.set_ylabel("Δ test accuracy, points")

    return findings, tables, draw


def _shown(folder: str, arm: str) -> bool:
    """`headline-vgg` has the criteria's arms, too, with other seeds."""
    return arm == "lite" if folder == "headline-vgg" else arm.startswith("lite")
