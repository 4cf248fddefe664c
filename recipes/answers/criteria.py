"""The page of the plan `criteria`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.answers.evidence import Evidence, report_of
from recipes.answers.plans import CHOSEN
from recipes.answers.wording import Parts, cells_at, compared, corrected, is_shown, listed, p_text, pointed
from recipes.plots import COLOURS
from recipes.report import MARGIN, Report
from recipes.statistics import Paired, paired
from recipes.studies.base import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LOWEST = 3  # densities, of which the mean is taken


def lowest_mean(report: Report, arm: str, measure: str) -> Paired | None:
    """An arm against `none` in the mean over the three lowest densities, paired by seed."""
    last = report.config.cycles
    pairs = []
    for seed, rows in report.by_arm[arm].items():
        others = report.by_arm["none"].get(seed, [])
        if len(rows) > last and len(others) > last:
            mean = [sum(r[measure] for r in its[-LOWEST:]) / LOWEST for its in (rows, others)]
            pairs.append(mean)
    return paired([a for a, _ in pairs], [b for _, b in pairs], MARGIN) if pairs else None


def choice(evidence: Evidence) -> str:
    """The criterion that the plan's rule picks: the best in validation accuracy over the three lowest densities."""
    report = report_of(evidence, "criteria-global")
    gains = {arm: lowest_mean(report, arm, "val_accuracy") for arm in report.arms if arm not in ("none", "lite")}
    best = max((arm for arm, gain in gains.items() if gain is not None), key=lambda arm: gains[arm].difference)  # type: ignore[union-attr]
    return best.removeprefix("lite:")


def parts(evidence: Evidence) -> Parts:
    findings: list[str] = []
    tables: list[Table] = []
    folders = evidence["folders"]
    sets = {
        "criteria-global": ("Compared globally", None),
        "criteria-as-ap": ("As many from each layer as AP would take there", "criteria-global"),
        "criteria-decay": ("With weight decay 5e-4", None),
        "criteria-standard": ("With images normalised to zero mean", None),
    }
    scatter: list[tuple[str, float, float]] = []
    for name, (title, baseline) in sets.items():
        if name not in folders:
            continue
        report = report_of(evidence, name, baseline)
        means = {arm: lowest_mean(report, arm, "accuracy") for arm in report.arms if arm != "none"}
        tests = corrected({arm: mean for arm, mean in means.items() if mean is not None})
        lines = []
        for arm in sorted(tests, key=lambda arm: -tests[arm].difference):
            rate = lowest_mean(report, arm, "dnr_total")
            last = next((c for c in cells_at(report, report.config.cycles) if c["arm"] == arm), None)
            lines.append(
                [
                    "least-moved-negative (AP)" if arm == "lite" else arm.removeprefix("lite:"),
                    tests[arm].n,
                    pointed(lowest_mean(report, arm, "val_accuracy")),
                    pointed(tests[arm]),
                    p_text(tests[arm].p_holm),
                    pointed(rate),
                    pointed(last["accuracy_difference"]) if last else "–",
                ]
            )
            if name == "criteria-global" and rate is not None:
                label = "AP" if arm == "lite" else arm.removeprefix("lite:")
                scatter.append((label, 100 * rate.difference, 100 * tests[arm].difference))
        columns = [
            "criterion",
            "seeds",
            "Δ validation, points",
            "Δ test, points",
            "p (Holm)",
            "Δ DNR, points",
            "Δ test, last density",
        ]
        text = f"{title}: against no AP, means over the three lowest densities"
        tables.append(Table(text, columns, lines))
        if name == "criteria-global":
            better, worse = ([arm for arm, test in tests.items() if is_shown(test, sign)] for sign in (1, -1))
            findings.append(
                f"Against pruning without AP, {listed(better)} {'is' if len(better) == 1 else 'are'} shown to be "
                f"better in test accuracy, {listed(worse)} worse."
            )
            findings.append(f"The rule picks `{choice(evidence)}` by validation accuracy.")
    if len(scatter) > 2:
        r = float(np.corrcoef([x for _, x, _ in scatter], [y for *_, y in scatter])[0, 1])
        findings.append(
            f"Across {len(scatter)} criteria the change in accuracy and the change in dead-neuron rate correlate with "
            f"r = {r:+.2f} (if fewer dead neurons meant accuracy, it would be clearly negative)."
        )
    if "confirm-cnn" in folders:
        report = report_of(evidence, "confirm-cnn")
        rows = [(["confirm-cnn"], cell) for cell in cells_at(report)]
        own = _against_ap(report)
        if own is not None:
            rows.append((["confirm-cnn"], own))
        tables.append(
            compared(rows, "Confirmation: fresh seeds, another data set and network, the last density", ["network"])
        )
        for _, cell in rows:
            d = cell["accuracy_difference"]
            shown = "a difference is shown" if is_shown(d) else "no difference shown"
            findings.append(
                f"Confirmation, {cell['arm']} − {cell['baseline']}: {pointed(d)} points, p {p_text(d.p_holm)}: {shown}."
            )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (label, x, y) in enumerate(scatter):
            axes.plot(x, y, "o", color=COLOURS[i % len(COLOURS)])
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.axhline(0, color="0.8", zorder=0)
        axes.axvline(0, color="0.8", zorder=0)
        axes.margins(x=0.15)
        axes.set(xlabel="Δ total dead-neuron rate, points", ylabel="Δ test accuracy, points")

    return findings, tables, draw


def _against_ap(report: Report) -> dict[str, Any] | None:
    """The chosen criterion against AP's own, at the last density."""
    arm, last = f"lite:{CHOSEN}", report.config.cycles
    seeds = [s for s in report.by_arm[arm] if min(len(report.by_arm[a].get(s, [])) for a in (arm, "lite")) > last]
    if not seeds:
        return None
    rows = [[report.by_arm[a][s][last] for s in seeds] for a in (arm, "lite")]
    cell: dict[str, Any] = {"arm": arm, "baseline": "lite", "density": rows[0][0]["density"]}
    for measure in ("accuracy", "dnr_total"):
        a, b = ([row[measure] for row in its] for its in rows)
        cell[f"{measure}_difference"] = paired(a, b, MARGIN)
    return cell
