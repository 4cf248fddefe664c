"""The pages of measured answers, made from their numbers alone: what they say follows from the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes import plots
from recipes.answers.evidence import Evidence, report_of
from recipes.answers.plans import CHOSEN, Plan
from recipes.plots import COLOURS
from recipes.report import MARGIN, Report, percent, points
from recipes.statistics import Paired, holm, paired
from recipes.storage import write_whole
from recipes.studies.base import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Parts = tuple[list[str], list[Table], Callable[["Figure"], None]]
LOWEST = 3  # densities, of which the criteria plan takes the mean


def page(plan: Plan, evidence: Evidence) -> str:
    """The page as Markdown."""
    return _text(plan, evidence, _parts(plan, evidence))


def _text(plan: Plan, evidence: Evidence, parts: Parts) -> str:
    findings, tables, _ = parts
    machine = evidence["machine"]
    missing = {name: entry["missing"] for name, entry in evidence["folders"].items() if entry["missing"]}
    absent = [name for name in plan.experiments if name not in evidence["folders"]]
    hours = sum(
        row["train_s"] or 0
        for entry in evidence["folders"].values()
        for seeds in entry["arms"].values()
        for rows in seeds.values()
        for row in rows
    )
    lines = [
        f"# {plan.question}",
        f"**Plan, written before the runs.** {plan.text}",
        "## Answer",
        "\n".join(f"- {finding}" for finding in findings),
        f"![{plan.question}](../images/results/{plan.name}.png)",
        "## What was measured",
        *(table.markdown() for table in tables),
    ]
    if missing or absent:
        gaps = [f"{name} ({n} runs)" for name, n in missing.items()] + absent
        lines.append(f"**Not run** (of what was planned): {', '.join(gaps)}.")
    lines += [
        "## How to make it again",
        f"```\npython -m recipes answer {plan.name} --out RUNS --docs docs            # runs what is left\n"
        f"python -m recipes answer {plan.name} --out RUNS --docs docs --report   # only the page, from the runs\n"
        f"python -m recipes answer {plan.name} --docs docs                       # the same, from its numbers\n```",
        f"{machine['cpu']}, one thread a run, torch {machine['torch']}, Python {machine['python']}; "
        f"{hours / 3600:.1f} hours of training, on a machine with other work. ± and brackets are 95 % intervals over "
        "seeds (Student's t), differences are paired by seed, p is of the paired t-test, *detectable* is the "
        "difference that so many pairs show with 80 % power. The whole configuration of every experiment is "
        f"in `{plan.name}.json`.",
    ]
    return "\n\n".join(lines) + "\n"


def write(plan: Plan, evidence: Evidence, docs: Path) -> Path:
    """Writes the page, its picture and its numbers; returns where the page is."""
    from matplotlib.figure import Figure

    results, images = docs / "results", docs / "images" / "results"
    for folder in (results, images):
        folder.mkdir(parents=True, exist_ok=True)
    parts = _parts(plan, evidence)
    figure = Figure(figsize=(10, 4), layout="constrained")
    parts[2](figure)
    plots.save(figure, images / f"{plan.name}.png")
    write_whole(results / f"{plan.name}.json", json.dumps(evidence, separators=(",", ":")) + "\n")
    write_whole(results / f"{plan.name}.md", _text(plan, evidence, parts))
    return results / f"{plan.name}.md"


def _parts(plan: Plan, evidence: Evidence) -> Parts:
    makers = {"dead-neurons": _dead_neurons, "effect": _effect, "criteria": _criteria}
    return makers[plan.name](evidence)


def summary(effect: Evidence, criteria: Evidence) -> Table:
    """What AP, and the criterion that the plan `criteria` picked, did at the last density of every network."""
    reports = {name.removeprefix("headline-"): report_of(effect, name) for name in sorted(effect["folders"])}
    reports = {name: report for name, report in reports.items() if not name.startswith("grid-")}
    if "confirm-cnn" in criteria["folders"]:
        reports["cnn"] = report_of(criteria, "confirm-cnn")
    lines = []
    for report in reports.values():
        config, cells = report.config, {cell["arm"]: cell for cell in _cells(report)}
        if "lite" not in cells:
            continue
        base = next(c for c in report.cells if c["arm"] == "none" and c["cycle"] == cells["lite"]["cycle"])
        images = f", {config.train_images:,} images" if config.train_images else ""
        norm = "with BatchNorm" if config.model.startswith("resnet") else "without BatchNorm"
        decay = f", weight decay {config.weight_decay:g}" if config.weight_decay else ""
        width = f" × {config.width:g}" if config.width != 1 else ""
        other = cells.get(f"lite:{CHOSEN}")
        lines.append(
            [
                f"{config.model}{width}, {norm}, {config.data}{images}{decay}",
                f"{base['density']:.1%}",
                cells["lite"]["accuracy_difference"].n,
                percent(base["accuracy"]),
                _points(cells["lite"]["accuracy_difference"]),
                _points(cells["lite"]["dnr_total_difference"]),
                _points(other["accuracy_difference"]) if other else "–",
            ]
        )
    columns = ["network", "weights left", "seeds", "accuracy without AP, %", "AP, Δ points", "AP, Δ dead-neuron rate"]
    return Table("", [*columns, f"`{CHOSEN}` instead, Δ points"], lines)


# --- numbers as text --------------------------------------------------------------------------------------------------


def _points(value: Paired | None) -> str:
    return "–" if value is None else points(value)


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _compared(rows: list[tuple[list[str], dict[str, Any]]], title: str, columns: list[str]) -> Table:
    """A table of paired comparisons, with Holm's correction over all its lines."""
    corrected = holm([cell["accuracy_difference"].p for _, cell in rows])
    lines = []
    for (labels, cell), p in zip(rows, corrected, strict=True):
        d: Paired = cell["accuracy_difference"]
        equal = "–" if d.equivalent is None else "yes" if d.equivalent else "no"
        seen = "–" if d.detectable is None else f"{100 * d.detectable:.2f}"
        against = f"{cell['arm']} − {cell['baseline']}"
        change = _points(cell["dnr_total_difference"])
        lines.append([*labels, against, f"{cell['density']:.1%}", d.n, _points(d), _p(p), equal, seen, change])
        cell["p_here"] = p
    names = ["compared", "density", "seeds", "Δ accuracy, points", "p (Holm)", "within ±0.5", "detectable", "Δ DNR"]
    return Table(title, [*columns, *names], lines)


def _cells(report: Report, cycle: int | None = None) -> list[dict[str, Any]]:
    """The cells with a comparison, at one cycle, or the last that has any."""
    have = [cell for cell in report.cells if cell["accuracy_difference"] is not None and cell["cycle"] > 0]
    cycle = max((cell["cycle"] for cell in have), default=0) if cycle is None else cycle
    return [cell for cell in have if cell["cycle"] == cycle]


def _significant(cells: list[dict[str, Any]], sign: int) -> list[dict[str, Any]]:
    return [
        c
        for c in cells
        if c["p_here"] is not None and c["p_here"] < 0.05 and sign * c["accuracy_difference"].difference > 0
    ]


# --- dead-neurons -----------------------------------------------------------------------------------------------------


def _dead_neurons(evidence: Evidence) -> Parts:
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
            f"({_points(change)} points, {change.n} seeds)"
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


# --- effect -----------------------------------------------------------------------------------------------------------


def _effect(evidence: Evidence) -> Parts:
    headline = {n: report_of(evidence, n) for n in evidence["folders"] if n.startswith("headline-")}
    grid = {n: report_of(evidence, n) for n in evidence["folders"] if n.startswith("grid-")}
    tables, findings = [], []
    main = [([name], cell) for name, report in headline.items() for cell in _primary(report)]
    if main:
        tables.append(_compared(main, "Headline cells: the last density, magnitude pruning", ["network"]))
        findings.append(_verdict("headline", [cell for _, cell in main]))
    side = []
    for name, report in grid.items():
        _, pruner, decay = name.split("-", 2)
        side += [([pruner, "5e-4" if decay == "decay" else "0"], cell) for cell in _primary(report)]
    if side:
        title = "Grid: LeNet-300-100 on 10,000 Fashion-MNIST images, the last density"
        tables.append(_compared(side, title, ["pruner", "weight decay"]))
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
                    _points(d),
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
        from matplotlib.ticker import FuncFormatter

        shown = headline or grid
        for axes, (name, report) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            for i, arm in enumerate(a for a in report.arms if a in ("lite", "pro")):
                cells = [c for c in report.cells if c["arm"] == arm and c["cycle"] and c["accuracy_difference"]]
                y = [100 * c["accuracy_difference"].difference for c in cells]
                e = [100 * (c["accuracy_difference"].half_width or 0) for c in cells]
                label = f"{arm} − {cells[0]['baseline']}" if cells else arm
                axes.errorbar(
                    [c["density"] for c in cells], y, e, color=COLOURS[i + 1], marker=".", capsize=2, label=label
                )
            axes.axhspan(-100 * MARGIN, 100 * MARGIN, color="0.93", zorder=0)
            axes.axhline(0, color="0.7", zorder=1)
            axes.set(xscale="log", title=name, xlabel="density")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
            axes.invert_xaxis()
            axes.legend(fontsize="small")
        figure.axes[0].set_ylabel("Δ test accuracy, points")

    return findings, tables, draw


def _primary(report: Report) -> list[dict[str, Any]]:
    """lite against none, and pro against pro:pruner."""
    return [c for c in _cells(report) if (c["arm"], c["baseline"]) in (("lite", "none"), ("pro", "pro:pruner"))]


def _verdict(what: str, cells: list[dict[str, Any]]) -> str:
    better, worse = _significant(cells, 1), _significant(cells, -1)
    equal = sum(bool(cell["accuracy_difference"].equivalent) for cell in cells)
    differences = [100 * cell["accuracy_difference"].difference for cell in cells]
    seen = [100 * d for cell in cells if (d := cell["accuracy_difference"].detectable) is not None]
    dnr = [100 * cell["dnr_total_difference"].difference for cell in cells if cell["dnr_total_difference"]]
    parts = [
        f"**{what}**: AP is better in {len(better)} and worse in {len(worse)} of {len(cells)} comparisons",
        f"shown to be equivalent within ±0.5 points in {equal}",
        f"differences from {min(differences):+.2f} to {max(differences):+.2f} points "
        f"(median {np.median(differences):+.2f}), of which {min(seen, default=np.nan):.2f} to "
        f"{max(seen, default=np.nan):.2f} could have been seen",
        f"the total dead-neuron rate changes by {min(dnr):+.1f} to {max(dnr):+.1f} points",
    ]
    return "; ".join(parts) + "."


# --- criteria ---------------------------------------------------------------------------------------------------------


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


def _criteria(evidence: Evidence) -> Parts:
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
        arms = [arm for arm in report.arms if arm != "none"]
        tests = {arm: lowest_mean(report, arm, "accuracy") for arm in arms}
        arms = [arm for arm in arms if tests[arm] is not None]
        p = dict(zip(arms, holm([tests[arm].p for arm in arms]), strict=True))  # type: ignore[union-attr]
        lines = []
        for arm in sorted(arms, key=lambda arm: -tests[arm].difference):  # type: ignore[union-attr]
            rate = lowest_mean(report, arm, "dnr_total")
            last = next((c for c in _cells(report, report.config.cycles) if c["arm"] == arm), None)
            lines.append(
                [
                    "least-moved-negative (AP)" if arm == "lite" else arm.removeprefix("lite:"),
                    tests[arm].n,  # type: ignore[union-attr]
                    _points(lowest_mean(report, arm, "val_accuracy")),
                    _points(tests[arm]),
                    _p(p[arm]),
                    _points(rate),
                    _points(last["accuracy_difference"]) if last else "–",
                ]
            )
            if name == "criteria-global" and rate is not None:
                label = "AP" if arm == "lite" else arm.removeprefix("lite:")
                scatter.append((label, 100 * rate.difference, 100 * tests[arm].difference))  # type: ignore[union-attr]
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
            better = [a for a in arms if p[a] is not None and p[a] < 0.05 and tests[a].difference > 0]  # type: ignore[operator, union-attr]
            worse = [a for a in arms if p[a] is not None and p[a] < 0.05 and tests[a].difference < 0]  # type: ignore[operator, union-attr]
            findings.append(
                f"Against pruning without AP, {_list(better)} {'is' if len(better) == 1 else 'are'} shown to be better "
                f"in test accuracy, {_list(worse)} worse."
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
        rows = [(["confirm-cnn"], cell) for cell in _cells(report)]
        own = _against_ap(report)
        if own is not None:
            rows.append((["confirm-cnn"], own))
        tables.append(
            _compared(rows, "Confirmation: fresh seeds, another data set and network, the last density", ["network"])
        )
        for _, cell in rows:
            d, p_here = cell["accuracy_difference"], cell["p_here"]
            shown = "a difference is shown" if p_here is not None and p_here < 0.05 else "no difference shown"
            findings.append(
                f"Confirmation, {cell['arm']} − {cell['baseline']}: {_points(d)} points, p {_p(p_here)}: {shown}."
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


def _list(arms: list[str]) -> str:
    return ", ".join("AP" if arm == "lite" else f"`{arm.removeprefix('lite:')}`" for arm in arms) or "none"
