"""The pages of the plans `effect` and `presets`, and the README's table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from recipes import models, plots
from recipes.answers.evidence import Evidence, report_of
from recipes.answers.plans import CHOSEN
from recipes.answers.wording import Parts, cells_at, compared, is_shown, pointed
from recipes.plots import COLOURS
from recipes.report import MARGIN, Report, percent
from recipes.statistics import Paired
from recipes.studies.base import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


TITLES = {
    "effect": ("headline", "Headline cells"),
    "presets": ("short runs", "Short runs"),
    "published": ("published networks", "Published networks"),
}


def parts(evidence: Evidence) -> Parts:
    headline = {n: report_of(evidence, n) for n in evidence["folders"] if not n.startswith("grid-")}
    grid = {n: report_of(evidence, n) for n in evidence["folders"] if n.startswith("grid-")}
    tables, findings = [], []
    main = [([name], cell) for name, report in headline.items() for cell in _primary(report)]
    what, title = TITLES[evidence["plan"]]
    if main:
        tables.append(compared(main, f"{title}: the last density, magnitude pruning", ["network"]))
        findings.append(_verdict(what, [cell for _, cell in main]))
    other = [
        ([n], cell) for n, report in headline.items() for cell in cells_at(report) if cell["arm"] == f"lite:{CHOSEN}"
    ]
    if other:
        tables.append(compared(other, f"{title}: `{CHOSEN}` in the place of AP's criterion", ["network"]))
        findings.append(_verdict(f"{what}, `{CHOSEN}`", [cell for _, cell in other], f"`{CHOSEN}`"))
    side = []
    for name, report in grid.items():
        _, pruner, decay = name.split("-", 2)
        side += [([pruner, "5e-4" if decay == "decay" else "0"], cell) for cell in _primary(report)]
    if side:
        title = "Grid: LeNet-300-100 on 10,000 Fashion-MNIST images, the last density"
        tables.append(compared(side, title, ["pruner", "weight decay"]))
        findings.append(_verdict("grid", [cell for _, cell in side]))
    for name, report in headline.items():
        lines = []
        for cell in report.cells:
            d = cell["accuracy_difference"] if cell["cycle"] else None
            lines.append(
                [
                    f"{cell['density']:.1%}",
                    cell["arm"],
                    len(cell["seeds"]),
                    percent(cell["accuracy"]),
                    pointed(d),
                    percent(cell["dnr_total"], 1),
                    percent(cell["dnr_static"], 1),
                    percent(cell["effective_density"]),
                    percent(cell["negative_share"], 0),
                    percent(cell["overlap_smallest_negative"], 0),
                    percent(cell["overlap_pruner"], 0),
                ]
            )
        columns = [
            "density", "arm", "seeds", "accuracy, %", "Δ, points", "DNR total, %", "static, %", "effective density, %",
            "negative, %", "AP's choice also smallest-negative, %", "also the pruner's next, %",
        ]  # fmt: skip
        tables.append(Table(f"{name}, every density", columns, lines))

    def draw(figure: Figure) -> None:
        shown = headline or grid
        for axes, (name, report) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            for i, arm in enumerate(a for a in report.arms if a in ("lite", "pro")):
                cells = [c for c in report.cells if c["arm"] == arm and c["cycle"] and c["accuracy_difference"]]
                label = f"{arm} − {cells[0]['baseline']}" if cells else arm
                plots.difference(axes, cells, "accuracy_difference", COLOURS[i + 1], label)
            axes.axhspan(-100 * MARGIN, 100 * MARGIN, color="0.93", zorder=0)
            plots.dress(axes, name)
        figure.axes[0].set_ylabel("Δ test accuracy, points")

    return findings, tables, draw


def _primary(report: Report) -> list[dict[str, Any]]:
    """lite against none, and pro against pro:pruner."""
    return [c for c in cells_at(report) if (c["arm"], c["baseline"]) in (("lite", "none"), ("pro", "pro:pruner"))]


def _verdict(what: str, cells: list[dict[str, Any]], who: str = "AP") -> str:
    better, worse = ([cell for cell in cells if is_shown(cell["accuracy_difference"], sign)] for sign in (1, -1))
    equal = sum(bool(cell["accuracy_difference"].equivalent) for cell in cells)
    differences = [100 * cell["accuracy_difference"].difference for cell in cells]
    seen = [100 * d for cell in cells if (d := cell["accuracy_difference"].detectable) is not None]
    dnr = [100 * cell["dnr_total_difference"].difference for cell in cells if cell["dnr_total_difference"]]
    spread = f"differences from {min(differences):+.2f} to {max(differences):+.2f} points"
    if not seen:
        return f"**{what}**: one seed each, which shows nothing about {who}; {spread}."
    parts = [
        f"**{what}**: {who} is better in {len(better)} and worse in {len(worse)} of {len(cells)} comparisons",
        f"shown to be equivalent within ±0.5 points in {equal}",
        f"{spread} (median {np.median(differences):+.2f}), of which {min(seen):.2f} to {max(seen):.2f} could have "
        "been seen",
        f"the total dead-neuron rate changes by {min(dnr):+.1f} to {max(dnr):+.1f} points",
    ]
    return "; ".join(parts) + "."


def summary(effect: Evidence, criteria: Evidence) -> Table:
    """What AP, and the criterion that the plan `criteria` picked, did at the last density of every network."""
    reports = {name.removeprefix("headline-"): report_of(effect, name) for name in sorted(effect["folders"])}
    reports = {name: report for name, report in reports.items() if not name.startswith("grid-")}
    if "confirm-cnn" in criteria["folders"]:
        reports["cnn"] = report_of(criteria, "confirm-cnn")
    lines = []
    for report in reports.values():
        config, cells = report.config, {cell["arm"]: cell for cell in cells_at(report)}
        if "lite" not in cells:
            continue
        base = next(c for c in report.cells if c["arm"] == "none" and c["cycle"] == cells["lite"]["cycle"])
        images = f", {config.train_images:,} images" if config.train_images else ""
        norm = "with BatchNorm" if _has_batchnorm(config.model) else "without BatchNorm"
        decay = f", weight decay {config.weight_decay:g}" if config.weight_decay else ""
        width = f" × {config.width:g}" if config.width != 1 else ""
        other = cells.get(f"lite:{CHOSEN}")
        lines.append(
            [
                f"{config.model}{width}, {norm}, {config.data}{images}{decay}",
                f"{base['density']:.1%}",
                cells["lite"]["accuracy_difference"].n,
                percent(base["accuracy"]),
                pointed(cells["lite"]["accuracy_difference"]),
                pointed(cells["lite"]["dnr_total_difference"]),
                _chosen(other["accuracy_difference"], cells["lite"]["accuracy_difference"].n) if other else "–",
            ]
        )
    columns = ["network", "weights left", "seeds", "accuracy without AP, %", "AP, Δ points", "AP, Δ dead-neuron rate"]
    return Table("", [*columns, f"`{CHOSEN}` instead, Δ points"], lines)


def _has_batchnorm(model: str) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in models.create(model).modules())


def _chosen(difference: Paired, seeds: int) -> str:
    return pointed(difference) + ("" if difference.n == seeds else f" ({difference.n} seeds)")
