"""Plots of an experiment, as PNG files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.storage import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ap.dnr_report import DNRReport
    from recipes.pool import Pool
    from recipes.report import Report

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


def draw(report: Report, out: Path) -> list[Path]:
    """comparison.png: accuracy, dead-neuron rates and paired differences against density; layers.png: DNR by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    for index, arm in enumerate(report.arms):
        cells = [cell for cell in report.cells if cell["arm"] == arm]
        colour = COLOURS[index % len(COLOURS)]
        _curve(axes[0][0], cells, "accuracy", colour, arm)
        _curve(axes[0][1], cells, "dnr_total", colour, arm)
        _curve(axes[0][1], cells, "dnr_static", colour, None, "--")
        compared = [cell for cell in cells if cell["cycle"] and cell["accuracy_difference"] is not None]
        if compared:
            label = f"{arm} − {compared[0]['baseline']}"
            difference(axes[1][0], compared, "accuracy_difference", colour, label)
            difference(axes[1][1], compared, "dnr_total_difference", colour, label)
    titles = (
        "test accuracy, %",
        "dead-neuron rate, % (dashed: static)",
        "difference in accuracy, points",
        "difference in DNR, points",
    )
    for axis, title in zip(axes.ravel(), titles, strict=True):
        dress(axis, title)
    config = report.config
    figure.suptitle(
        f"{config.model} on {config.data}, {config.pruner}, {config.seeds} seeds (mean and 95 % confidence interval)",
        fontsize=11,
    )
    paths = [save(figure, out / "comparison.png")]
    layers = _layers(report)
    if layers is not None:
        paths.append(save(layers, out / "layers.png"))
    return paths


def _curve(
    axis: Axes, cells: list[dict[str, Any]], measure: str, colour: str, label: str | None, style: str = "-"
) -> None:
    cells = [cell for cell in cells if cell[measure] is not None]
    x = [100 * cell["density"] for cell in cells]
    y = [100 * cell[measure].mean for cell in cells]
    half = [100 * (cell[measure].half_width or 0) for cell in cells]
    axis.plot(x, y, style, color=colour, label=label, marker="o", markersize=3, linewidth=1.4)
    axis.fill_between(
        x,
        [a - b for a, b in zip(y, half, strict=True)],
        [a + b for a, b in zip(y, half, strict=True)],
        color=colour,
        alpha=0.12,
        linewidth=0,
    )


def difference(
    axis: Axes, cells: list[dict[str, Any]], measure: str, colour: str, label: str | None, beside: float = 1.0
) -> None:
    """Paired differences against density, in points, with their intervals; `beside` moves them off other curves."""
    cells = [cell for cell in cells if cell[measure] is not None]
    x = [100 * cell["density"] * beside for cell in cells]
    y = [100 * cell[measure].difference for cell in cells]
    half = [100 * (cell[measure].half_width or 0) for cell in cells]
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.errorbar(x, y, yerr=half, color=colour, label=label, marker="o", markersize=4, linewidth=1, capsize=2)


def dress(axis: Axes, title: str) -> None:
    """Title, density on a logarithmic axis from dense to sparse, grid and legend."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_title(title, fontsize=10)
    axis.set_xlabel("weights alive, %", fontsize=9)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    low, high = axis.get_xlim()
    axis.set_xticks([tick for tick in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if low <= tick <= high])
    axis.invert_xaxis()
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False)


def differences(pool: Pool, path: Path) -> Path:
    """The paired differences in accuracy and in DNR of several experiments, a row a pruner."""
    from matplotlib.figure import Figure

    by_pruner: dict[str, list[Report]] = {}
    for report in pool.reports:
        by_pruner.setdefault(report.config.pruner, []).append(report)
    figure = Figure(figsize=(11, 0.5 + 3.2 * len(by_pruner)), layout="constrained")
    rows = figure.subplots(len(by_pruner), 2, squeeze=False, sharey="col")
    for axes, (pruner, reports) in zip(rows, by_pruner.items(), strict=True):
        lines = [(report, arm) for report in reports for arm in report.arms]
        number = 0
        for report, arm in lines:
            cells = [cell for cell in report.cells if cell["arm"] == arm and cell["cycle"]]
            compared = [cell for cell in cells if cell["accuracy_difference"] is not None]
            if not compared:
                continue
            label = f"{arm} − {compared[0]['baseline']}"
            label += f", {pool.label(report, 'pruner')}" if len(reports) > 1 else ""
            colour = COLOURS[number % len(COLOURS)]
            number += 1
            difference(axes[0], compared, "accuracy_difference", colour, label)
            difference(axes[1], compared, "dnr_total_difference", colour, None)
        dress(axes[0], f"{pruner}: difference in accuracy, points")
        dress(axes[1], f"{pruner}: difference in DNR, points")
    figure.suptitle("paired differences (mean and 95 % confidence interval)", fontsize=11)
    return save(figure, path)


def _layers(report: Report) -> Figure | None:
    """Each layer's dead-neuron rate against density, an arm a panel."""
    from matplotlib.figure import Figure

    tables = {}
    for arm in report.arms:
        rows = [rows for rows in report.by_arm[arm].values() if rows and rows[-1].get("dnr_layers")]
        if rows:
            shortest = min(len(r) for r in rows)
            names = list(rows[0][0]["dnr_layers"])
            grid = [
                [100 * sum(r[cycle]["dnr_layers"][name][0] for r in rows) / len(rows) for cycle in range(shortest)]
                for name in names
            ]
            tables[arm] = (names, [rows[0][cycle]["density"] for cycle in range(shortest)], grid)
    if not tables:
        return None
    height = 1.6 + 0.22 * max(len(names) for names, _, _ in tables.values())
    figure = Figure(figsize=(1.5 + 4.2 * len(tables), height), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axis, (arm, (names, densities, grid)) in zip(panels, tables.items(), strict=True):
        image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=100)
        axis.set_title(arm, fontsize=10)
        axis.set_xlabel("weights alive, %", fontsize=9)
        step = max(1, len(densities) // 6)
        axis.set_xticks(range(0, len(densities), step), [f"{100 * d:.3g}" for d in densities[::step]], fontsize=8)
        axis.set_yticks(range(len(names)), names if axis is panels[0] else [""] * len(names), fontsize=8)
    figure.colorbar(image, ax=list(panels), label="dead-neuron rate, %")
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG, whole or not at all; returns where it is."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(path, buffer.getvalue())
    return path


def bars(report: DNRReport, path: Path, title: str) -> Path:
    """The dead-neuron rate of every layer that can die, static and dynamic."""
    from matplotlib.figure import Figure

    layers = [layer for layer in report.layers.values() if layer.can_die]
    figure = Figure(figsize=(7, 1.2 + 0.25 * len(layers)), layout="constrained")
    axis = figure.subplots()
    names = [layer.name for layer in layers]
    static = [100 * (layer.static or 0) for layer in layers]
    axis.barh(names, static, color=COLOURS[1], label="static: dead for every input")
    axis.barh(names, [100 * (layer.dynamic or 0) for layer in layers], left=static, color=COLOURS[6], label="dynamic")
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("dead-neuron rate, %")
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    return save(figure, path)
