"""Numbers as text, and tables of comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from recipes.report import Report, points
from recipes.statistics import LEVEL, Paired, holm
from recipes.studies.base import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

K = TypeVar("K")
Parts = tuple[list[str], list[Table], Callable[["Figure"], None]]  # findings, tables, what draws the picture


def pointed(value: Paired | None) -> str:
    return "–" if value is None else points(value)


def p_text(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def corrected(tests: Mapping[K, Paired]) -> dict[K, Paired]:
    """The comparisons of a table, with Holm's correction over all of them."""
    return {
        key: replace(d, p_holm=p)
        for (key, d), p in zip(tests.items(), holm([d.p for d in tests.values()]), strict=True)
    }


def is_shown(test: Paired, sign: int = 0) -> bool:
    """Whether a difference is shown after the correction; with a sign, one in that direction."""
    return test.p_holm is not None and test.p_holm < LEVEL and sign * test.difference >= 0


def compared(rows: list[tuple[list[str], dict[str, Any]]], title: str, columns: list[str]) -> Table:
    """A table of paired comparisons; Holm's correction over all its lines is put into the cells, too."""
    tests = corrected({i: cell["accuracy_difference"] for i, (_, cell) in enumerate(rows)})
    lines = []
    for i, (labels, cell) in enumerate(rows):
        d = cell["accuracy_difference"] = tests[i]
        equal = "–" if d.equivalent is None else "yes" if d.equivalent else "no"
        seen = "–" if d.detectable is None else f"{100 * d.detectable:.2f}"
        against = f"{cell['arm']} − {cell['baseline']}"
        change = pointed(cell["dnr_total_difference"])
        lines.append(
            [*labels, against, f"{cell['density']:.1%}", d.n, pointed(d), p_text(d.p_holm), equal, seen, change]
        )
    names = ["compared", "density", "seeds", "Δ accuracy, points", "p (Holm)", "within ±0.5", "detectable", "Δ DNR"]
    return Table(title, [*columns, *names], lines)


def cells_at(report: Report, cycle: int | None = None) -> list[dict[str, Any]]:
    """The cells with a comparison, at one cycle, or the last that has any."""
    have = [cell for cell in report.cells if cell["accuracy_difference"] is not None and cell["cycle"] > 0]
    cycle = max((cell["cycle"] for cell in have), default=0) if cycle is None else cycle
    return [cell for cell in have if cell["cycle"] == cycle]


def listed(arms: list[str]) -> str:
    return ", ".join("AP" if arm == "lite" else f"`{arm.removeprefix('lite:')}`" for arm in arms) or "none"
