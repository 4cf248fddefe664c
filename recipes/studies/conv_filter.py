"""Learning one convolutional filter by gradient descent: how the input decides the speed."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.studies.base import Data, Journal, Study, Table, Verdict, check, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[..., Tensor]
INPUTS: dict[str, Draw] = {
    "Gaussian": lambda *size, generator: torch.randn(*size, generator=generator),
    "uniform": lambda *size, generator: torch.rand(*size, generator=generator) * 2 - 1,
    "signs": lambda *size, generator: torch.randint(0, 2, size, generator=generator) * 2.0 - 1,
    "Laplace": lambda *size, generator: _laplace(torch.rand(*size, generator=generator) - 0.5),
}


def _laplace(u: Tensor) -> Tensor:
    return -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))


def close_patches(draw: Draw, closeness: float, n: int, k: int, d: int, generator: torch.Generator) -> Tensor:
    """Inputs [n, k, d]: k patches of norm √d, which share the part `closeness` of their direction."""
    common, own = draw(n, 1, d, generator=generator), draw(n, k, d, generator=generator)
    return math.sqrt(d) * F.normalize(closeness * common + math.sqrt(1 - closeness**2) * own, dim=2)


def spread_directions(spread: float, filter_: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Inputs [n, 1, d] of norm 1 around a direction at 45° to the filter: the larger `spread`, the smoother."""
    d = len(filter_)
    side = torch.randn(d, generator=generator)
    side = F.normalize(side - (side @ filter_) * filter_, dim=0)
    centre = (filter_ + side) / math.sqrt(2)
    return F.normalize(centre + spread / math.sqrt(d) * torch.randn(n, 1, d, generator=generator), dim=2)


def descend(
    inputs: Tensor,
    teacher: Tensor,
    starts: Tensor,
    rate: Callable[[int], float],
    *,
    tolerance: float = 1e-3,
    limit: int = 4000,
    batch: int | None = None,
    seed: int = 0,
) -> list[int | None]:
    """Steps until ‖w − w*‖ < tolerance · ‖w*‖ from each start, None where that never happens.

    The network is f(Z) = (1/k) Σᵢ relu(wᵀZᵢ), the loss the mean of ½ (f − f*)² over `inputs` [n, k, d] (or over
    batches of them); all `starts` [T, d] descend together.
    """
    n, k, d = inputs.shape
    target = (inputs @ teacher).relu().mean(1)  # [n]
    w = starts.clone()
    steps: list[int | None] = [None] * len(w)
    generator = torch.Generator().manual_seed(seed)
    for step in range(limit + 1):
        error = (w - teacher).norm(dim=1) / teacher.norm()
        for t in torch.nonzero(error < tolerance).flatten().tolist():
            if steps[t] is None:
                steps[t] = step
        if None not in steps or not bool(torch.isfinite(error).any()):
            break
        z, y = inputs, target
        if batch is not None:
            index = torch.randint(0, n, (batch,), generator=generator)
            z, y = inputs[index], target[index]
        flat = z.reshape(-1, d)
        before = (flat @ w.T).view(-1, k, len(w))
        residual = before.relu().mean(1) - y[:, None]  # [n, T]
        back = (before > 0) * residual[:, None, :] / (k * len(y))
        w = w - rate(step) * (back.reshape(-1, len(w)).T @ flat)
    return steps


@register("conv-filter")
@dataclass(frozen=True, kw_only=True)
class ConvFilter(Study):
    """Learning one convolutional filter by gradient descent."""

    title: ClassVar[str] = "Learning one convolutional filter"
    claim: ClassVar[str] = (
        "Gradient descent from a small random start recovers a convolutional filter under a ReLU in polynomial "
        "time, for any input distribution that is smooth enough, Gaussian or not; it is the faster the closer the "
        "patches are to each other and the smoother the input's directions; a rate that grows after the first "
        "steps pays (Du, Lee & Tian 2017)."
    )
    setting: ClassVar[str] = (
        "Teacher and student f(Z) = (1/k) Σ relu(wᵀZᵢ) with the loss ½ (f − f*)² on a fixed sample; starts of norm"
        " 0.1 in random directions. Measured: steps until the relative error is below 10⁻³, the median over the "
        "starts, whose descents run as one. Patches are √d · normalise(c · common + √(1−c²) · own), c being their "
        "closeness; the angular spread is that of inputs of norm 1 around a direction at 45° to the filter."
    )

    inputs: int = 800
    """Samples."""
    size: int = 8
    """Patches a sample, and numbers a patch."""
    starts: int = 20
    """Random starts."""
    limit: int = 6000
    """Steps after which a descent counts as failed."""

    @classmethod
    def quick(cls, **options: object) -> ConvFilter:
        return cls(**{"starts": 10, "limit": 3000, **options})  # type: ignore[arg-type]

    def measure(self, journal: Journal) -> Data:
        generator = torch.Generator().manual_seed(self.seed)
        k = d = self.size
        teacher = F.normalize(torch.randn(d, generator=generator), dim=0)
        starts = 0.1 * F.normalize(torch.randn(self.starts, d, generator=generator), dim=1)

        def patches(name: str, closeness: float) -> Tensor:
            own = torch.Generator().manual_seed(self.seed + 1)
            return close_patches(INPUTS[name], closeness, self.inputs, k, d, own)

        def run(z: Tensor, rate: Callable[[int], float], batch: int | None = None) -> list[int | None]:
            return descend(z, teacher, starts, rate, limit=self.limit, batch=batch, seed=self.seed)

        data: Data = {"closeness": [], "spread": [], "rates": []}
        for name, closeness, batch in itertools.product(INPUTS, (0.0, 0.5, 0.8, 0.95, 1.0), (None, 32)):
            steps = journal.cell(f"{name} {closeness} {batch}", run, patches(name, closeness), lambda step: 0.5, batch)
            data["closeness"].append({"inputs": name, "closeness": closeness, "batch": batch, "steps": steps})
        for spread in (0.2, 0.5, 1.0, 2.0):
            own = torch.Generator().manual_seed(self.seed + 2)
            z = spread_directions(spread, teacher, self.inputs, own)
            steps = journal.cell(f"spread {spread}", run, z, lambda step: 1.0)
            data["spread"].append({"spread": spread, "steps": steps})
        z = patches("Gaussian", 0.8)
        for first, second in ((0.25, 0.25), (0.5, 0.5), (1.0, 1.0), (2.0, 2.0), (4.0, 4.0), (8.0, 8.0), (0.25, 2.0)):
            steps = journal.cell(f"rates {first} {second}", run, z, functools.partial(_two_stage, first, second))
            data["rates"].append({"first": first, "second": second, "steps": steps})
        return data

    @classmethod
    def tables(cls, data: Data) -> list[Table]:
        closenesses = sorted({row["closeness"] for row in data["closeness"]})
        rows = []
        for name, batch in dict.fromkeys((row["inputs"], row["batch"]) for row in data["closeness"]):
            cells = [_text(_find(data, name, batch, c)) for c in closenesses]
            rows.append([name, "full batch" if batch is None else f"batches of {batch}", *cells])
        return [
            Table(
                "Median steps by closeness of the patches, rate 0.5",
                ["inputs", "descent", *(f"closeness {c:g}" for c in closenesses)],
                rows,
            ),
            Table(
                "Median steps by angular spread of the inputs, k = 1, rate 1",
                ["spread", "of all starts", "of those that arrive"],
                [
                    [f"{row['spread']:g}", _text(row["steps"]), _text([s for s in row["steps"] if s is not None])]
                    for row in data["spread"]
                ],
            ),
            Table(
                "Median steps by rate, Gaussian patches of closeness 0.8",
                ["rate of the first 5 steps", "then", "steps"],
                [[f"{row['first']:g}", f"{row['second']:g}", _text(row["steps"])] for row in data["rates"]],
            ),
        ]

    @classmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        full = [row for row in data["closeness"] if row["batch"] is None]
        gaussian = [_median(row["steps"]) for row in full if row["inputs"] == "Gaussian"]
        others = {row["inputs"] for row in full} - {"Gaussian"}
        # Signs of eight coordinates have no smooth direction distribution; where they fail the table shows it.
        smooth = [row for row in data["closeness"] if row["inputs"] != "signs"]
        spread = [_median([s for s in row["steps"] if s is not None]) for row in data["spread"]]
        stuck = sum(s is None for row in data["spread"] for s in row["steps"])
        rates = {(row["first"], row["second"]): _median(row["steps"]) for row in data["rates"]}
        two, slow, large = rates[0.25, 2.0], rates[0.25, 0.25], rates[2.0, 2.0]
        succeeded = sum(None not in row["steps"] for row in smooth)
        falls = all(
            _falling([_median(row["steps"]) for row in full if row["inputs"] == name], slack=1.2) for name in others
        )
        return [
            check(
                "every start recovers the filter, with Gaussian, uniform and Laplace inputs, full batch and stochastic",
                succeeded == len(smooth),
                f"all starts of {succeeded} of {len(smooth)} settings",
            ),
            check(
                "the closer the patches, the fewer steps (Gaussian)",
                _falling(gaussian, slack=1.05),
                ", ".join(f"{v:.0f}" for v in gaussian),
            ),
            check("the same for non-Gaussian inputs", falls, ", ".join(sorted(others)) + ", steps may stall by 20 %"),
            check(
                "the wider the inputs' directions, the fewer steps of the starts that arrive",
                _falling(spread),
                f"{', '.join(f'{v:.0f}' for v in spread)}; {stuck} starts never arrive",
            ),
            check(
                "raising the rate after 5 steps beats the small rate", two < slow, f"{two:.0f} against {slow:.0f} steps"
            ),
            check(
                "the small rate is needed first: the large one alone is slower, or fails",
                two < large,
                f"{two:.0f} steps in two stages, {large:.0f} at the large rate alone",
            ),
        ]

    @classmethod
    def plot(cls, data: Data, figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for name, batch in dict.fromkeys((row["inputs"], row["batch"]) for row in data["closeness"]):
            rows = [row for row in data["closeness"] if (row["inputs"], row["batch"]) == (name, batch)]
            left.plot(
                [row["closeness"] for row in rows],
                [_median(row["steps"]) for row in rows],
                marker="o",
                linestyle="-" if batch is None else ":",
                label=f"{name}, {'full batch' if batch is None else 'stochastic'}",
            )
        left.set(xlabel="closeness of the patches", ylabel="steps to relative error 10⁻³ (median)", yscale="log")
        left.legend(fontsize="x-small")
        arrived = [_median([s for s in row["steps"] if s is not None]) for row in data["spread"]]
        right.plot([row["spread"] for row in data["spread"]], arrived, marker="o")
        right.set(xlabel="angular spread of the inputs (k = 1)")


def _two_stage(first: float, second: float, step: int) -> float:
    return first if step < 5 else second


def _find(data: Data, name: str, batch: int | None, closeness: float) -> list[int | None]:
    for row in data["closeness"]:
        if (row["inputs"], row["batch"], row["closeness"]) == (name, batch, closeness):
            return row["steps"]
    raise KeyError((name, batch, closeness))


def _median(steps: Sequence[int | None]) -> float:
    """The median, infinite where half of the starts failed or none is given."""
    if not steps:
        return math.inf
    ordered = sorted(math.inf if s is None else float(s) for s in steps)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _text(steps: Sequence[int | None]) -> str:
    failed, value = sum(s is None for s in steps), _median(steps)
    text = f"{value:.0f}" if math.isfinite(value) else "never"
    return f"{text} ({failed} of {len(steps)} failed)" if failed else text


def _falling(values: Sequence[float], slack: float = 1.0) -> bool:
    """Whether each value is finite and at most `slack` times the one before, and the last below the first."""
    steps = itertools.pairwise(values)
    return all(math.isfinite(v) for v in values) and all(b <= slack * a for a, b in steps) and values[-1] < values[0]
