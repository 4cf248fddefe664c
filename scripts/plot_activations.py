#!/usr/bin/env python3
"""Draws every activation with its slope, and writes docs/activations.md: formulas, sources, gains, dead ranges."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from torch import nn

from ap import activations, init

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "activations"  # the same file from the same functions


class Entry(NamedTuple):
    """What the page says of one activation."""

    formula: str
    source: str
    use: str


ENTRIES = {
    "relu": Entry("max(0, x)", "Nair and Hinton 2010", "The default; exact zeros, so neurons can die and be counted."),
    "leaky_relu": Entry("max(0, x) + a·min(0, x), a = 0.01", "Maas et al. 2013", "ReLU that cannot die."),
    "prelu": Entry("max(0, x) + a·min(0, x), a learned", "He et al. 2015", "A learned slope; no weight decay on it."),
    "rrelu": Entry("max(0, x) + a·min(0, x), a random in training", "Xu et al. 2015", "Regularises small data sets."),
    "relu6": Entry("min(6, max(0, x))", "Howard et al. 2017", "Low-precision inference."),
    "relu_squared": Entry("max(0, x)²", "So et al. 2021", "Transformers; needs normalisation, see the exponent."),
    "star_relu": Entry(
        "s·max(0, x)² + b", "Yu et al. 2022", "The same with mean 0 and variance 1; needs normalisation too."
    ),
    "helu": Entry(
        "max(0, x); the gradient passes for x > −α",
        "Kimhi et al. 2024",
        "ReLU's outputs, fewer stuck units.",
    ),
    "smelu": Entry(
        "0, (x + β)²/4β for |x| ≤ β, x",
        "Shamir et al. 2020",
        "A smooth ReLU with exact zeros.",
    ),
    "gsmelu": Entry(
        "slopes g₋ and g₊ joined by a parabola on [−α, β]",
        "Shamir et al. 2020",
        "Asymmetric SmeLU, also leaky.",
    ),
    "rescu": Entry(
        "t + g₋(x + α) + (g₊ − g₋)((α + β)∫F + relu(x − β))",
        "Shamir et al. 2020",
        "An activation from any transition F; the smoothstep is twice differentiable.",
    ),
    "gelu": Entry("x·Φ(x)", "Hendrycks and Gimpel 2016", "Transformers."),
    "silu": Entry("x·σ(x)", "Elfwing et al. 2018", "Deep convolutional networks with normalisation."),
    "swish": Entry("x·σ(βx)", "Ramachandran et al. 2017", "SiLU with a β to choose or to learn."),
    "mish": Entry("x·tanh(ln(1 + eˣ))", "Misra 2019", "Close to SiLU."),
    "hardswish": Entry("x·relu6(x + 3)/6", "Howard et al. 2019", "SiLU at low cost; exact zeros below −3."),
    "gcu": Entry("x·cos x", "Noel et al. 2021", "Few units; oscillates, NaN at ±∞."),
    "elu": Entry("x, eˣ − 1 for x < 0", "Clevert et al. 2015", "Networks without normalisation."),
    "celu": Entry("x, α(e^(x/α) − 1) for x < 0", "Barron 2017", "ELU with a continuous slope for every α."),
    "selu": Entry("λ·elu(x; α), fixed λ and α", "Klambauer et al. 2017", "Deep plain networks: mean 0, variance 1."),
    "softplus": Entry("ln(1 + eˣ)", "Dugas et al. 2001", "Positive outputs."),
    "sigmoid": Entry("1/(1 + e⁻ˣ)", "", "Gates."),
    "tanh": Entry("tanh x", "", "Bounded outputs, recurrent networks."),
    "hardsigmoid": Entry("relu6(x + 3)/6", "Courbariaux et al. 2015", "Gates at low cost."),
    "hardtanh": Entry("max(−1, min(1, x))", "Collobert 2004", "Tanh at low cost."),
    "threshold": Entry("x above θ, else a value; both 0 here", "", "ReLU with another threshold."),
    "hardshrink": Entry("x outside [−λ, λ], else 0", "", "Sparse codes."),
    "softshrink": Entry("x ∓ λ outside [−λ, λ], else 0", "", "Sparse codes (the proximal map of |x|)."),
    "tanhshrink": Entry("x − tanh x", "", "Sparse codes without a threshold."),
    "softsign": Entry("x/(1 + |x|)", "Turian et al. 2009", "Tanh with slower saturation."),
    "logsigmoid": Entry("−ln(1 + e⁻ˣ)", "", "Log-probabilities of a gate."),
}


def curve(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient (for HeLU the surrogate that it trains with)."""
    x = x.clone().requires_grad_()
    y = module(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def draw(name: str, folder: Path) -> None:
    """One small picture: value, slope, and the dead range shaded."""
    module = activations.create(name).double().eval()
    x = torch.linspace(-6, 6, 2401, dtype=torch.float64)
    y, slope = curve(module, x)
    figure, axes = plt.subplots(figsize=(3.2, 2.2))
    dead = activations.dead_range(module)
    if dead is not None:
        axes.axvspan(max(float(dead.low), -6), min(float(dead.high), 6), color="0.9", lw=0, label="dead")
    axes.plot(x, y, color="tab:blue", label="value")
    axes.plot(x, slope, color="tab:orange", lw=1, ls="--", label="slope")
    axes.set(xlim=(-6, 6), ylim=(-2, 4), title=name)
    axes.axhline(0, color="0.6", lw=0.5)
    axes.axvline(0, color="0.6", lw=0.5)
    axes.legend(fontsize=6, loc="upper left", frameon=False)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def interval(name: str) -> str:
    """The dead range as text."""
    dead = activations.dead_range(activations.create(name))
    if dead is None:
        return "–"
    low, high = float(dead.low), float(dead.high)
    left = "(−∞" if low == float("-inf") else f"[{low:.3g}"
    right = "∞)" if high == float("inf") else f"{high:.4g}]"
    return f"{left}, {right}".replace("-", "−")


def table() -> str:
    """One row an activation."""
    lines = [
        "| name | formula | source | dead range | gain | exponent | when |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in ENTRIES.items():
        numbers = f"{init.gain(name):.5f} | {init.stability_exponent(name):.3f}"
        formula = entry.formula.replace("|", "\\|")
        use = entry.use.replace("|", "\\|")
        lines.append(f"| `{name}` | {formula} | {entry.source} | {interval(name)} | {numbers} | {use} |")
    return "\n".join(lines)


def variances(depth: int = 30, width: int = 256, draws: int = 3) -> str:
    """The signal's variance through depth: in theory, and in real layers drawn by PyTorch's default and by ours."""
    lines = [
        f"| name | theory, gain | theory, variance 1/fan | {depth} layers, `initialize_` | PyTorch's default |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ("relu", "helu", "smelu", "prelu", "elu", "selu", "tanh", "gelu", "silu", "hardswish"):
        found: dict[bool, list[float]] = {True: [], False: []}
        for drawn in range(draws):
            for ours in found:
                torch.manual_seed(drawn)
                layers: list[nn.Module] = []
                for _ in range(depth + 1):
                    layers += [nn.Linear(width, width), activations.create(name)]
                model = nn.Sequential(*layers)
                if ours:
                    init.initialize_(model)
                with torch.no_grad():
                    first = model[0](torch.randn(256, width) / (init.gain(name) if ours else 1.0))  # ours: q = 1
                    last = model[1:-1](first)
                found[ours].append(float(last.square().mean() / first.square().mean()))
        spread = [f"{min(values):.2g} … {max(values):.2g}" for values in found.values()]
        theory = init.signal_variance(name, depth)[-1], init.signal_variance(name, depth, weight_variance=1.0)[-1]
        lines.append(f"| `{name}` | {theory[0]:.3g} | {theory[1]:.2g} | {spread[0]} | {spread[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Writes the pictures and replaces what stands between the page's markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path(__file__).resolve().parent.parent / "docs")
    options = parser.parse_args()
    missing = set(activations.names()) - set(ENTRIES)
    if missing:
        raise SystemExit(f"no entry for {', '.join(sorted(missing))}")
    folder = options.docs / "images" / "activations"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ENTRIES:
        draw(name, folder)
    pictures = "\n".join(f"![{name}: value and slope](images/activations/{name}.svg)" for name in ENTRIES)
    page = options.docs / "activations.md"
    text = page.read_text()
    for marker, content in {"table": table(), "pictures": pictures, "variances": variances()}.items():
        start, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"{page}: the markers {start.strip()} and {end} are missing")
        text = f"{before}{start}{content}\n{end}{after}"
    page.write_text(text)


if __name__ == "__main__":
    main()
