"""The page of the plan `depth`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recipes.answers.evidence import Evidence, report_of
from recipes.answers.wording import Parts, compared, p_text, pointed
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
    findings = [
        f"{network}, {_name(c)}: {pointed(c['accuracy_difference'])} points at {c['density']:.1%} of the weights "
        f"(p {p_text(c['p_here'])}, {c['accuracy_difference'].n} seeds), "
        f"to {percent(c['accuracy'], 1)} %; dead-neuron rate {pointed(c['dnr_total_difference'])}."
        for network, c in first
    ]

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axes = figure.subplots()
        curves = dict.fromkeys((network, c["arm"]) for network, c in cells)
        for i, (network, arm) in enumerate(curves):
            its = [c for n, c in cells if (n, c["arm"]) == (network, arm)]
            y = [100 * c["accuracy_difference"].difference for c in its]
            e = [100 * (c["accuracy_difference"].half_width or 0) for c in its]
            x = [c["density"] * (1 + 0.02 * i) for c in its]
            axes.errorbar(
                x,
                y,
                e,
                color=COLOURS[i % len(COLOURS)],
                marker=".",
                capsize=2,
                label=f"{_name(its[0]).strip('`')}, {network}",
            )
        axes.axhline(0, color="0.7", zorder=0)
        axes.set(xscale="log", xlabel="density", ylabel="Δ test accuracy, points")
        axes.set_xticks(sorted({c["density"] for _, c in cells}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.1f} %"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.invert_xaxis()
        axes.legend(fontsize="small")

    return findings, tables, draw


def _shown(folder: str, arm: str) -> bool:
    """`headline-vgg` has the criteria's arms, too, with other seeds."""
    return arm == "lite" if folder == "headline-vgg" else arm.startswith("lite")


def _name(cell: dict[str, Any]) -> str:
    return "AP" if cell["arm"] == "lite" else f"`{cell['arm'].removeprefix('lite:')}`"
