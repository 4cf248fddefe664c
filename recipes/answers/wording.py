"""Numbers as text, and tables of comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from recipes.report import Report, points
from recipes.statistics import Paired, holm
from recipes.studies.base import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Parts = tuple[list[str], list[Table], Callable[["Figure"], None]]  # findings, tables, what draws the picture


def pointed(value: Paired | None) -> str:
    return "–" if value is None else points(value)


def p_text(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def compared(rows: list[tuple[list[str], dict[str, Any]]], title: str, columns: list[str]) -> Table:
    """A table of paired comparisons, with Holm's correction over all its lines."""
    corrected = holm([cell["accuracy_difference"].p for _, cell in rows])
    lines = []
    for (labels, cell), p in zip(rows, corrected, strict=True):
        d: Paired = cell["accuracy_difference"]
        equal = "–" if d.equivalent is None else "yes" if d.equivalent else "no"
        seen = "–" if d.detectable is None else f"{100 * d.detectable:.2f}"
        against = f"{cell['arm']} − {cell['baseline']}"
        change = pointed(cell["dnr_total_difference"])
        lines.append([*labels, against, f"{cell['density']:.1%}", d.n, pointed(d), p_text(p), equal, seen, change])
        cell["p_here"] = p
    names = ["compared", "density", "seeds", "Δ accuracy, points", "p (Holm)", "within ±0.5", "detectable", "Δ DNR"]
    return Table(title, [*columns, *names], lines)


def cells_at(report: Report, cycle: int | None = None) -> list[dict[str, Any]]:
    """The cells with a comparison, at one cycle, or the last that has any."""
    have = [cell for cell in report.cells if cell["accuracy_difference"] is not None and cell["cycle"] > 0]
    cycle = max((cell["cycle"] for cell in have), default=0) if cycle is None else cycle
    return [cell for cell in have if cell["cycle"] == cycle]


def significant(cells: list[dict[str, Any]], sign: int) -> list[dict[str, Any]]:
    return [
        c
        for c in cells
        if c["p_here"] is not None and c["p_here"] < 0.05 and sign * c["accuracy_difference"].difference > 0
    ]


def listed(arms: list[str]) -> str:
    return ", ".join("AP" if arm == "lite" else f"`{arm.removeprefix('lite:')}`" for arm in arms) or "none"
