"""GELU's analysis, and the same for the other activations."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from recipes.studies.base import OPPOSITE, REPRODUCED, Data, Journal, Study, Table, Verdict, check, register
from recipes.studies.calculus import FUNCTIONS, analyse, derivatives

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PUBLISHED_LIPSCHITZ = 1.084


@register("gelu")
@dataclass(frozen=True, kw_only=True)
class Gelu(Study):
    """Bounds, stationary and inflection points, Lipschitz and smoothness constants."""

    title: ClassVar[str] = "GELU's analysis, and everyone else's"
    claim: ClassVar[str] = (
        "GELU is bounded below, and it and its derivative have known bounds that make training well-behaved: a "
        "Lipschitz constant of 1.084 has been published for it (Lee 2023)."
    )
    setting: ClassVar[str] = (
        "Formulas in double precision, derivatives up to the fourth by automatic differentiation, a grid on [−12, "
        "12]; between grid points a value can be exceeded by at most h²/8 times the bound of its second derivative"
        " (that of the grid with a tenth added), which is the ± of the table. Zeros are bisected to 10⁻¹². Nothing"
        " is random."
    )

    step: float = 1e-4
    """Distance of the grid points, h."""

    @classmethod
    def quick(cls, **options: object) -> Gelu:
        return cls(**{"step": 1e-3, **options})  # type: ignore[arg-type]

    def measure(self, journal: Journal) -> Data:
        return {name: journal.cell(name, self._one, name) for name in FUNCTIONS}

    def _one(self, name: str) -> Data:
        found = asdict(analyse(FUNCTIONS[name], self.step))
        if not math.isfinite(found["lipschitz"]):
            found["lipschitz"] = None
        return found

    @classmethod
    def tables(cls, data: Data) -> list[Table]:
        rows, points = [], []
        for name, row in data.items():
            low, high, curve = row["slope_low"], row["slope_high"], row["curvature"]
            unbounded = row["lipschitz"] is None
            error = max(low["error"], high["error"])
            lipschitz = "unbounded" if unbounded else f"{row['lipschitz']:.6f} ± {error:.0e}"
            smooth = "∞ (the slope jumps)" if curve is None else f"{abs(curve['value']):.6f} ± {curve['error']:.0e}"
            slope = "(−∞, ∞)" if unbounded else f"[{low['value']:.6f}, {high['value']:.6f}]"
            rows.append([name, slope, lipschitz, "unbounded" if unbounded and name == "gcu" else smooth])
            least = row["minimum"]
            at_edge = abs(abs(least["at"]) - 12) < 1e-6
            minimum = "–" if at_edge or name == "gcu" else f"{least['value']:.6f} at {least['at']:.4f}"
            points.append([name, minimum, *(_points(row[k]) for k in ("stationary", "inflection"))])
        return [
            Table(
                "Slope, Lipschitz constant sup |f′| and smoothness constant sup |f″|",
                ["activation", "slope", "Lipschitz", "smoothness"],
                rows,
            ),
            Table(
                "Minimum, stationary points (f′ changes sign) and inflection points (f″ changes sign) within [−12, 12]",
                ["activation", "minimum", "stationary", "inflection"],
                points,
            ),
        ]

    @classmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        gelu, tanh = data["gelu"], data["gelu (tanh)"]
        constant, error = gelu["lipschitz"], gelu["slope_high"]["error"]
        smooth = [n for n, row in data.items() if row["curvature"] is not None and row["lipschitz"] is not None]
        least = gelu["minimum"]
        return [
            check(
                "GELU is bounded below, with one stationary point",
                len(gelu["stationary"]) == 1,
                f"minimum {least['value']:.6f} at {gelu['stationary'][0]:.6f}",
            ),
            Verdict(
                f"{PUBLISHED_LIPSCHITZ} is a Lipschitz constant of GELU",
                REPRODUCED if constant + error <= PUBLISHED_LIPSCHITZ else OPPOSITE,
                f"the slope reaches {constant:.6f} ± {error:.0e} at {gelu['slope_high']['at']:.4f}",
            ),
            check(
                "GELU has a bounded second derivative, which ReLU has not",
                gelu["curvature"] is not None and data["relu"]["curvature"] is None,
                f"sup |f″| = {abs(gelu['curvature']['value']):.6f}; bounded as well: {', '.join(smooth)}",
            ),
            check(
                "the tanh form has the same constants to three digits",
                abs(tanh["lipschitz"] - constant) < 1e-3,
                f"{tanh['lipschitz']:.6f} against {constant:.6f}",
            ),
        ]

    @classmethod
    def plot(cls, data: Data, figure: Figure) -> None:
        x = torch.linspace(-4, 4, 800, dtype=torch.float64)
        shown = [name for name in ("gelu", "silu", "mish", "softplus", "elu", "tanh") if name in data]
        for order, axes in enumerate(figure.subplots(1, 3)):
            for name in shown:
                function = FUNCTIONS[name]
                edges = [-math.inf, *function.breaks, math.inf]
                y = torch.full_like(x, math.nan)
                for low, high, formula in zip(edges[:-1], edges[1:], function.formulas, strict=True):
                    inside = (x >= low) & (x < high)
                    y[inside] = derivatives(formula, x[inside], order)[order]
                axes.plot(x, y, label=name)
            axes.set(title=("f", "f′", "f″")[order], xlabel="x")
        figure.axes[0].legend(fontsize="x-small")


def _points(points: list[float]) -> str:
    if len(points) > 4:
        return f"{len(points)} points"
    return ", ".join(f"{p:.6f}" for p in points) or "none"
