"""The page of the plan `activations`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from recipes.answers.evidence import Evidence, report_of
from recipes.answers.wording import Parts, corrected, is_shown, p_text, pointed
from recipes.plots import COLOURS
from recipes.report import MARGIN, Report, percent
from recipes.statistics import Paired, mean_of, paired
from recipes.studies.base import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NETWORKS = {"mlp": "LeNet-300-100, Fashion-MNIST", "cnn": "CNN, CIFAR-10"}
Reports = dict[str, Report]  # by activation


def parts(evidence: Evidence) -> Parts:
    """Findings, tables and what draws the picture."""
    findings: list[str] = []
    tables: list[Table] = []
    effects: dict[str, dict[str, Paired]] = {}
    deaths: dict[str, dict[str, bool]] = {}
    for key, title in NETWORKS.items():
        start = f"activations-{key}-"
        reports = {n.removeprefix(start): report_of(evidence, n) for n in evidence["folders"] if n.startswith(start)}
        if "relu" not in reports:
            continue
        last = reports["relu"].config.cycles
        dies = {name: _seeds(report, "none", last, "dnr_total") != {} for name, report in reports.items()}
        against = corrected(
            {
                (cycle, name): _paired(_seeds(report, "none", cycle), _seeds(reports["relu"], "none", cycle))
                for name, report in reports.items()
                for cycle in (0, last)
                if name != "relu"
            }
        )
        effect = corrected(
            {name: _paired(_seeds(r, "lite", last), _seeds(r, "none", last)) for name, r in reports.items()}
        )
        effects[key], deaths[key] = effect, dies
        tables += [_accuracies(title, reports, against, last), _ap(title, reports, effect, dies, last)]
        findings += _findings(title, reports, against, effect, dies, last)

    def draw(figure: Figure) -> None:
        for axes, (key, effect) in zip(
            figure.subplots(1, len(effects), squeeze=False)[0], effects.items(), strict=True
        ):
            order = sorted(effect, key=lambda name: effect[name].difference)
            for i, name in enumerate(order):
                d = effect[name]
                colour = COLOURS[0] if deaths[key][name] else COLOURS[1]
                axes.errorbar(100 * d.difference, i, xerr=100 * (d.half_width or 0), fmt="o", ms=3, color=colour)
            axes.axvline(0, color="0.7", zorder=0)
            axes.set_yticks(range(len(order)), order, fontsize=6)
            axes.set(title=NETWORKS[key], xlabel="AP's effect on test accuracy, points")
        for label, colour in (("can die", COLOURS[0]), ("cannot", COLOURS[1])):
            figure.axes[0].plot([], [], "o", ms=3, color=colour, label=label)
        figure.axes[0].legend(fontsize="small")

    return findings, tables, draw


def _seeds(report: Report, arm: str, cycle: int, measure: str = "accuracy") -> dict[int, float]:
    rows = report.by_arm[arm]
    return {s: its[cycle][measure] for s, its in rows.items() if len(its) > cycle and its[cycle][measure] is not None}


def _paired(a: dict[int, float], b: dict[int, float]) -> Paired:
    seeds = sorted(a.keys() & b.keys())
    return paired([a[s] for s in seeds], [b[s] for s in seeds], MARGIN)


def _accuracies(title: str, reports: Reports, against: dict[tuple[int, str], Paired], last: int) -> Table:
    lines = []
    for name in sorted(reports, key=lambda name: -np.mean(list(_seeds(reports[name], "none", last).values()))):
        line = [name]
        for cycle in (0, last):
            line.append(percent(mean_of(list(_seeds(reports[name], "none", cycle).values()))))
            d = against.get((cycle, name))
            line += ["–", "–"] if d is None else [pointed(d), p_text(d.p_holm)]
        lines.append(line)
    columns = ["activation", "dense, %", "against ReLU", "p (Holm)", "pruned, %", "against ReLU, pruned", "p (Holm)"]
    density = next(iter(reports["relu"].by_arm["none"].values()))[last]["density"]
    return Table(f"{title}: test accuracy dense and at {density:.1%} of the weights, without AP", columns, lines)


def _ap(title: str, reports: Reports, effect: dict[str, Paired], dies: dict[str, bool], last: int) -> Table:
    lines = []
    for name in sorted(effect, key=lambda name: -effect[name].difference):
        rates = ["cannot die", "–"]
        if dies[name]:
            none, lite = (_seeds(reports[name], arm, last, "dnr_total") for arm in ("none", "lite"))
            rates = [percent(mean_of(list(none.values())), 1), pointed(_paired(lite, none))]
        seen = effect[name].detectable
        lines.append(
            [
                name,
                pointed(effect[name]),
                p_text(effect[name].p_holm),
                "–" if seen is None else f"{100 * seen:.2f}",
                *rates,
            ]
        )
    columns = ["activation", "AP's effect, points", "p (Holm)", "detectable", "DNR without AP, %", "AP's change of it"]
    return Table(f"{title}: AP against none at the last density", columns, lines)


def _findings(
    title: str,
    reports: Reports,
    against: dict[tuple[int, str], Paired],
    effect: dict[str, Paired],
    dies: dict[str, bool],
    last: int,
) -> list[str]:
    found = []
    for cycle, when in ((0, "dense"), (last, "pruned")):
        tests = {name: d for (c, name), d in against.items() if c == cycle}
        best = sorted(tests, key=lambda name: -tests[name].difference)
        better = [name for name in best if is_shown(tests[name], 1)]
        worse = [name for name in reversed(best) if is_shown(tests[name], -1)]
        found.append(f"{title}, {when}: better than ReLU {_names(better)}; worse {_names(worse)}.")
    moved = [name for name, d in effect.items() if is_shown(d)]
    found.append(f"{title}: an effect of AP is shown for {_names([f'{n} ({pointed(effect[n])})' for n in moved])}.")
    group: dict[bool, dict[int, float]] = {}
    for can in (True, False):
        rows = []
        for name, report in reports.items():
            if dies[name] == can:
                none, lite = (_seeds(report, arm, last) for arm in ("none", "lite"))
                rows.append({seed: lite[seed] - none[seed] for seed in none.keys() & lite.keys()})
        common = set.intersection(*(set(row) for row in rows)) if rows else set()
        group[can] = {seed: float(np.mean([row[seed] for row in rows])) for seed in common}
    if group[True] and group[False]:
        d = _paired(group[True], group[False])
        alive, dead = (mean_of(list(group[can].values())) for can in (False, True))
        found.append(
            f"{title}, primary outcome: AP's effect is {percent(dead)} points where neurons can die and "
            f"{percent(alive)} where they cannot; the difference is {pointed(d)} (p {p_text(d.p)}, {d.n} seeds)."
        )
    return found


def _names(names: list[str]) -> str:
    return ", ".join(names) or "none"
