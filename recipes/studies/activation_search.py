"""Searching for activations: all core units exhaustively, chains with a controller, and a fair match of the best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from recipes.studies import images, intervals
from recipes.studies.base import Data, Journal, Study, Table, Verdict, above, check, register
from recipes.studies.children import Child, train
from recipes.studies.controller import Controller, to_candidate
from recipes.studies.formula import Formula
from recipes.studies.grammar import BINARY, UNARY, Candidate, Unit, core_units, sieve, to_formula

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _unit(first: str, second: str, binary: str) -> Unit:
    return Unit(UNARY.index(first), UNARY.index(second), BINARY.index(binary))


RELU, SWISH = _unit("max(u, 0)", "max(u, 0)", "max(u, v)"), _unit("b * u", "u", "sigmoid(u) * v")
KEEP = _unit("u", "u", "max(u, v)")  # max(x, x): lengthens a chain and changes nothing
KNOWN = ("sigmoid(b0 * x) * x", "max(x, sigmoid(x))", "cos(x) - x", "min(x, sin(x))", "max(x, tanh(x))", "sinc(x) + x")


@register("activation-search")
@dataclass(frozen=True, kw_only=True)
class ActivationSearch(Study):
    """A search for activations: one core unit exhaustively, chains of units with a controller trained by PPO."""

    title: ClassVar[str] = "Searching for activations"
    claim: ClassVar[str] = (
        "An automated search over compositions of unary and binary functions finds activations that beat ReLU, "
        "among them Swish, x·σ(βx) (Ramachandran, Zoph & Le 2017)."
    )
    setting: ClassVar[str] = (
        "A core unit is b(u1(x), u2(x)) with 25 unary and 10 binary functions: 6,250. In a chain, a unit's first "
        "input is the output of the unit before, its second x or any earlier output; an LSTM controller writes "
        "chains and learns by PPO from the accuracy of their networks. Child networks are small, dense and "
        "normalised before each activation, and train for a fixed number of steps; hundreds train as one. "
        "Candidates that are not finite or constant, or equal to an earlier one, are rejected before. Choices are "
        "made on validation images: the best children are ranked again with more seeds, the best of those train a "
        "larger network with fresh seeds, and only that is measured on test images, against ReLU and Swish with "
        "the same seeds. β are learnable numbers that start at 1."
    )

    data: str = "digits"
    """Data set."""
    train: int = 1000
    """Training images."""
    val: int = 400
    """Validation images, on which candidates are chosen."""
    candidates: int = 6250
    """Core units to look at; fewer are drawn at random."""
    child: Child = Child()  # noqa: RUF009  (frozen)
    """The child networks."""
    chunk: int = 250
    """Child networks that train as one."""
    units: int = 2
    """Length of the chains that the controller writes."""
    rounds: int = 16
    """Updates of the controller."""
    writes: int = 32
    """Candidates that it writes for each update."""
    keep: int = 24
    """How many are ranked again, from both searches together."""
    seeds: int = 8
    """Seeds of the second ranking."""
    finalists: int = 4
    """How many go on to the larger network."""
    large: Child = Child((64, 64, 64, 64), 400)  # noqa: RUF009
    """The larger network."""
    final_seeds: int = 20
    """Seeds of the larger network."""
    device: str = "cpu"
    """Where the networks train: cpu, or cuda."""
    margin: float = 0.5
    """Percentage points within which an accuracy counts as no worse."""

    @classmethod
    def quick(cls, **options: object) -> ActivationSearch:
        small = {"candidates": 800, "child": Child((24, 24), 80), "rounds": 4, "writes": 16, "keep": 12, "seeds": 6}
        final = {"finalists": 2, "large": Child((48, 48, 48), 200), "final_seeds": 10, "margin": 1.0}
        return cls(**{**small, **final, **options})  # type: ignore[arg-type]

    def measure(self, journal: Journal) -> Data:
        everything = list(core_units())
        if self.candidates < len(everything):
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(len(everything), generator=generator)[: self.candidates].tolist()
            everything = [everything[i] for i in sorted(order)]
        seen: set[bytes] = set()
        passed = sieve(everything, seen)
        valid = [everything[i] for i in passed.valid]
        scores: list[float | None] = []
        for start in range(0, len(valid), self.chunk):
            part = valid[start : start + self.chunk]
            scores += journal.cell(f"units {start}", self._children, part, [self.seed] * len(part), self.child)
        found = list(zip(valid, scores, strict=True))
        chains, rejected, history = self._control(journal)
        unfinished = sum(score is None for _, score in [*found, *chains])
        best = _best([*found, *chains], self.keep)
        ranked = self._rank(journal, best)
        match = self._match(journal, [candidate for candidate, _ in ranked[: self.finalists]])
        return {
            "margin": self.margin,
            "looked_at": {"core units": len(everything), "chains": self.rounds * self.writes},
            "rejected": dict(Counter(passed.rejected) + Counter(rejected)) | {"training not finite": unfinished},
            "trained": len(found) + len(chains),
            "histogram": [score for _, score in found if score is not None],
            "controller": history,
            "ranked": [{"formula": to_formula(candidate), "accuracy": scores} for candidate, scores in ranked],
            "match": match,
            "winner": to_formula(ranked[0][0]),
            "known": self._known(found),
        }

    def _images(self) -> images.Images:
        return images.load(self.data, self.train, val=self.val).to(self.device)

    def _children(self, candidates: Sequence[Candidate], seeds: Sequence[int], child: Child) -> list[float | None]:
        data = self._images()
        return train(candidates, seeds, child, _flat(data.train), _flat(data.val), data.num_classes)

    def _control(self, journal: Journal) -> tuple[list[tuple[Candidate, float | None]], dict[str, int], list[Data]]:
        """The controller's search. A resumed one repeats its draws and updates with the rewards of the journal."""
        controller = Controller(self.units, self.seed)
        rewards: dict[Candidate, float | None] = {}
        rejected: Counter[str] = Counter()
        history = []
        for step in range(self.rounds):
            tokens = controller.sample(self.writes)
            written = [to_candidate(row) for row in tokens.tolist()]
            new = list(dict.fromkeys(c for c in written if c not in rewards))
            passed = sieve(new) if new else None
            fresh = [new[i] for i in passed.valid] if passed else []
            rejected.update(passed.rejected if passed else {})
            rewards |= dict.fromkeys(new)
            if fresh:
                scores = journal.cell(f"chains {step}", self._children, fresh, [self.seed] * len(fresh), self.child)
                rewards |= dict(zip(fresh, scores, strict=True))
            received = [rewards[c] or 0.0 for c in written]
            controller.update(tokens, received)
            history.append({"mean": sum(received) / len(received), "best": max(r or 0.0 for r in rewards.values())})
        return [(c, score) for c, score in rewards.items() if score is not None], dict(rejected), history

    def _rank(self, journal: Journal, best: list[Candidate]) -> list[tuple[Candidate, list[float]]]:
        seeds = [self.seed + 1 + i for i in range(self.seeds)]
        ranked = []
        for length in sorted({len(candidate) for candidate in best}):
            group = [candidate for candidate in best if len(candidate) == length]
            spread = [candidate for candidate in group for _ in seeds]
            scores = journal.cell(f"ranking {length}", self._children, spread, seeds * len(group), self.child)
            for i, candidate in enumerate(group):
                own = [score or 0.0 for score in scores[i * len(seeds) : (i + 1) * len(seeds)]]
                ranked.append((candidate, own))
        return sorted(ranked, key=lambda item: -sum(item[1]))

    def _match(self, journal: Journal, finalists: list[Candidate]) -> Data:
        seeds = [self.seed + 1000 + i for i in range(self.final_seeds)]
        players = {"ReLU": (RELU,), "Swish": (SWISH,)} | {to_formula(c): c for c in finalists}
        longest = max(len(c) for c in players.values())
        # Chains of one length train as one stack: shorter ones continue with max(x, x).
        even = [c + (KEEP,) * (longest - len(c)) for c in players.values()]

        def compete() -> list[float | None]:
            data = self._images()
            spread = [candidate for candidate in even for _ in seeds]
            return train(spread, seeds * len(even), self.large, _flat(data.train), _flat(data.test), data.num_classes)

        scores = journal.cell("match", compete)
        n = len(seeds)
        return {name: [s or 0.0 for s in scores[i * n : (i + 1) * n]] for i, name in enumerate(players)}

    def _known(self, found: list[tuple[Candidate, float | None]]) -> list[Data]:
        """Where the published finds are in this search's order."""
        order = sorted(((s or 0.0, to_formula(c)) for c, s in found), reverse=True)
        by_formula = {formula: (sum(s > score for s, _ in order) + 1, score) for score, formula in order}
        return [
            {"formula": name, "rank": by_formula[name][0], "accuracy": by_formula[name][1]}
            for name in KNOWN
            if name in by_formula
        ]

    @classmethod
    def tables(cls, data: Data) -> list[Table]:
        looked, rejected = data["looked_at"], data["rejected"]
        counts = [[f"looked at: {k}", v] for k, v in looked.items()]
        counts += [[f"rejected: {k}", v] for k, v in rejected.items()] + [["trained", data["trained"]]]
        match = data["match"]
        rows = []
        for name, scores in match.items():
            versus = [
                "–" if name == other else intervals.paired(scores, match[other]).text() for other in ("ReLU", "Swish")
            ]
            rows.append([f"`{name}`", intervals.mean(scores).text(), *versus])
        ranked = [[f"`{row['formula']}`", intervals.mean(row["accuracy"]).text()] for row in data["ranked"][:12]]
        known = [[f"`{row['formula']}`", row["rank"], f"{row['accuracy']:.1f}"] for row in data["known"]]
        winner = data["winner"]
        return [
            Table(
                "The larger network, test accuracy in % with fresh seeds; differences are paired by seed",
                ["activation", "accuracy", "against ReLU", "against Swish"],
                rows,
            ),
            Table(
                f'The winner is `{winner}`: `activations.create("formula", expression="{winner}")`, once '
                "`recipes.studies` is imported. The best of the second ranking, validation accuracy of the child",
                ["activation", "accuracy, %"],
                ranked,
            ),
            Table("Candidates", ["", "number"], counts),
            Table(
                f"Published finds among the {len(data['histogram'])} core units trained, one seed",
                ["activation", "place", "accuracy, %"],
                known,
            ),
        ]

    @classmethod
    def verdicts(cls, data: Data) -> list[Verdict]:
        match, winner, margin = data["match"], data["winner"], data["margin"]
        relu = intervals.paired(match[winner], match["ReLU"])
        swish = intervals.paired(match[winner], match["Swish"])
        other = intervals.paired(match["Swish"], match["ReLU"])
        first, last = data["controller"][0]["mean"], data["controller"][-1]["mean"]
        claim = f"`{winner}` is no worse than ReLU (−{margin:g} points)"
        return [
            above(claim, relu, f"{relu.text()} points", bound=-margin),
            above(f"`{winner}` beats ReLU", relu, f"{relu.text()} points"),
            above("Swish beats ReLU", other, f"{other.text()} points"),
            above(f"`{winner}` beats Swish", swish, f"{swish.text()} points"),
            check(
                "the controller's chains get better",
                last > first,
                f"mean reward {first:.1f} at first, {last:.1f} at last",
            ),
        ]

    @classmethod
    def plot(cls, data: Data, figure: Figure) -> None:
        shape, controller, histogram = figure.subplots(1, 3)
        x = torch.linspace(-5, 5, 400)
        for row in data["ranked"][:4]:
            with torch.no_grad():
                y: Tensor = Formula(row["formula"])(x)
            shape.plot(x, y, label=row["formula"])
        shape.plot(x, x.relu(), "k:", label="ReLU")
        shape.set(ylim=(-3, 5), title="the best, β = 1", xlabel="x")
        shape.legend(fontsize="xx-small")
        for key in ("mean", "best"):
            controller.plot([row[key] for row in data["controller"]], label=key)
        controller.set(title="controller", xlabel="update", ylabel="validation accuracy, %")
        controller.legend(fontsize="x-small")
        histogram.hist(data["histogram"], bins=40)
        histogram.set(title="core units", xlabel="validation accuracy, %", ylabel="number")


def _flat(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return part[0].flatten(1), part[1]


def _best(found: Sequence[tuple[Candidate, float | None]], keep: int) -> list[Candidate]:
    scored = [(score, candidate) for candidate, score in found if score is not None]
    return [candidate for _, candidate in sorted(scored, key=lambda item: -item[0])[:keep]]
