"""The page of the plan `dead-neurons`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from recipes.answers.evidence import Evidence, report_of
from recipes.answers.wording import Parts, pointed
from recipes.plots import COLOURS
from recipes.report import MARGIN, percent
from recipes.statistics import paired
from recipes.studies.base import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def parts(evidence: Evidence) -> Parts:
    reports = {name: report_of(evidence, name) for name in evidence["folders"]}
    findings, lines, curves = [], [], {}
    for name, report in reports.items():
        cells = [cell for cell in report.cells if cell["arm"] == "none" and cell["dnr_total"] is not None]
        if not cells:
            continue
        curves[name] = cells
        for cell in cells:
            rates = [percent(cell[rate], 1) for rate in ("dnr_total", "dnr_static", "dnr_dynamic")]
            lines.append([name, f"{cell['density']:.1%}", len(cell["seeds"]), *rates, percent(cell["accuracy"], 1)])
        rows = report.by_arm["none"]
        last = cells[-1]["cycle"]
        pairs = [(its[last]["dnr_dynamic"], its[0]["dnr_dynamic"]) for its in rows.values() if len(its) > last]
        change = paired([a for a, _ in pairs], [b for _, b in pairs], MARGIN)
        low, high = (change.difference + sign * (change.half_width or np.inf) for sign in (-1, 1))
        says = "falls" if high < 0 else "rises" if low > 0 else "does not change by more than its interval"
        findings.append(
            f"**{name}**: the dynamic rate {says} from dense to {cells[-1]['density']:.1%} of the weights "
            f"({pointed(change)} points, {change.n} seeds)"
        )
    columns = ["network", "density", "seeds", "total, %", "static, %", "dynamic, %", "accuracy, %"]
    tables = [Table("Dead-neuron rates of trained networks, on held-out images in evaluation mode", columns, lines)]
    steps = []
    for name, entry in evidence["folders"].items():
        runs = list(entry["over_steps"].values())
        if runs and len({len(run) for run in runs}) == 1:
            mean = np.mean([[row[1:] for row in run] for run in runs], axis=0)
            config = entry["experiment"]
            epochs = config["epochs"]
            for i, (total, static) in enumerate(mean):
                steps.append([name, i // epochs, i % epochs + 1, f"{100 * total:.1f}", f"{100 * static:.1f}"])
    if steps:
        columns = ["network", "cycle", "epoch", "total, %", "static, %"]
        tables.append(Table("Rates of training passes, by epoch (means over seeds)", columns, steps))

    def draw(figure: Figure) -> None:
        for axes, rate in zip(figure.subplots(1, 3, sharex=True), ("total", "static", "dynamic"), strict=True):
            for i, (name, cells) in enumerate(curves.items()):
                x = [cell["density"] for cell in cells]
                y = [100 * cell[f"dnr_{rate}"].mean for cell in cells]
                e = [100 * (cell[f"dnr_{rate}"].half_width or 0) for cell in cells]
                axes.errorbar(x, y, e, color=COLOURS[i % len(COLOURS)], marker=".", capsize=2, label=name)
            axes.set(xscale="log", title=f"{rate} rate, %", xlabel="density")
            axes.invert_xaxis()
        figure.axes[0].legend(fontsize="small")

    return findings, tables, draw
