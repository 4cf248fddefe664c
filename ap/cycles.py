"""The iterative loop: train, prune, activate, rewind, and again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ap.criteria import Criterion
from ap.masks import Masks, check_share
from ap.names import unknown
from ap.plugin import AP, Selection, split
from ap.ranking import count_true, lowest
from ap.rewind import Rewind, Snapshot
from ap.warn import warn

VARIANTS = ("none", "lite", "pro", "solo")
_SCHEMA = 1
Metrics = dict[str, Any]
Train = Callable[[nn.Module, Masks, "Run"], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Run:
    """One training, as the training function sees it.

    Attributes:
        loop: the loop it belongs to; `loop.state_dict()` is what a checkpoint in the middle of this training needs.
        cycle: how many prunings have happened, 0 for the dense network.
        phase: "train", or "retrain" for the second training of a cycle of the variant pro.
        start_step: the optimizer step that the weights stand at; the learning-rate schedule starts there.
        rewind: what the loop rewinds to; with "none" a later cycle's training is a fine-tuning.
    """

    loop: Cycles
    cycle: int
    phase: str
    start_step: int
    rewind: Rewind

    def reached(self, step: int) -> None:
        """To be called after each optimizer step, with the number of steps made, when rewinding to a step."""
        self.loop._reached(step)

    def went_back(self, step: int) -> None:
        """To be called when a training goes on from an earlier step of its own: what was kept of later ones goes."""
        self.loop._went_back(step)


class Cycles:
    """The loop of iterative pruning as an object: it can be saved before any training, and in the middle of one.

    In each cycle round(p·A) of the A weights alive go, in every variant: with "none" the pruner removes them all; with
    "lite" the pruner removes p − q and AP q at once; with "pro" the network is rewound and trained again in between,
    and AP looks at that training; with "solo" AP alone removes p. The row of a cycle describes the network trained from
    the masks and weights at its start, so n cycles give n + 1 rows.

    Args:
        model: what to prune, at its initial weights.
        pruner: an object with `prune(model, masks, amount=, batches=, loss_fn=)`, or a plain function
            `(model, masks) -> scores`; not needed by "solo".
        cycles: n, how many prunings.
        amount: p, in (0, 1).
        ap: "none", "lite", "pro" or "solo".
        rate: q, in (0, amount).
        criterion: which weights AP takes, see `ap.criteria`; "pruner" stands for the pruner's own next choices, the
            control of "pro" ("lite" with it is "none").
        where, allocation: as for `AP`.
        rewind: "init", a step such as "500it" or "2ep", "lr" or "none".
        batches, loss_fn: for pruners and criteria that need data.
        steps_per_epoch: what "2ep" is counted in; default len(batches), where it has a length.
        masks: the model's masks, if not all weights are to be pruned.
        example_input: for models whose graph cannot be found without (`where="rectified"`).
        seed: for criteria that draw.

    Raises:
        ValueError: anything out of range or unknown, before any training.

    Attributes:
        history: one row a trained network.
        done: whether nothing is left to do.
    """

    def __init__(
        self,
        model: nn.Module,
        pruner: Any = None,
        *,
        cycles: int = 20,
        amount: float = 0.2,
        ap: str = "lite",
        rate: float = 0.02,
        criterion: str | Criterion = "least-moved-negative",
        where: str | Iterable[str] = "all",
        allocation: str = "global",
        rewind: str | Rewind = "init",
        batches: Iterable[Any] | None = None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        steps_per_epoch: int | None = None,
        masks: Masks | None = None,
        example_input: Any = None,
        seed: int = 0,
    ) -> None:
        if ap not in VARIANTS:
            raise unknown("variant", ap, VARIANTS)
        if isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 0:
            raise ValueError(f"cycles must be a whole number, 0 or more, not {cycles!r}")
        if steps_per_epoch is None and hasattr(batches, "__len__"):
            steps_per_epoch = len(batches)  # type: ignore[arg-type]
        check_share(amount, "amount", 1)
        if ap in ("lite", "pro"):
            split(1, amount, rate)
        self.by_pruner = isinstance(criterion, str) and criterion == "pruner"
        if self.by_pruner and ap == "solo":
            raise ValueError("solo:pruner contradicts itself: solo has no pruner")
        if ap == "lite" and self.by_pruner:
            ap = "none"  # the pruner once, with p: the same by construction
        if pruner is None and ap != "solo":
            raise ValueError(f"ap={ap!r} needs a pruner, e.g. pruners.create('magnitude')")
        if isinstance(pruner, str):
            raise TypeError(f"pruner={pruner!r}: pass the object, pruners.create({pruner!r})")
        if pruner is not None and not callable(pruner) and not hasattr(pruner, "prune"):
            raise TypeError(
                f"a pruner has .prune(model, masks, amount=…) or is a function, not a {type(pruner).__name__}"
            )
        self.rewind = Rewind.parse(rewind, steps_per_epoch)
        if self.rewind.restores and getattr(pruner, "changes_shapes", False):
            raise ValueError(
                f"{getattr(pruner, 'name', type(pruner).__name__)} makes layers smaller, so that earlier weights fit "
                f"no more: rewind='lr' or 'none', not {rewind!r}"
            )
        self.model, self.pruner, self.cycles = model, pruner, cycles
        self.variant, self.amount, self.rate = ap, amount, rate
        self.batches, self.loss_fn = batches, loss_fn
        self.plugin = AP(
            masks if masks is not None else Masks(model),
            rate if ap in ("lite", "pro") else amount,
            criterion="least-moved-negative" if self.by_pruner or ap == "none" else criterion,
            where=where,
            allocation=allocation,
            batches=batches,
            example_input=example_input,
            seed=seed,
        )
        self.history: list[Metrics] = []
        self.cycle = 0
        self.phase = "train"
        self.done = False
        self._trainings = 0
        self._alive_at_start = self.masks.alive
        self._removed: Metrics = {"pruned": 0, "activated": 0}
        self._resumed = False
        self._snapshot = Snapshot(model) if self.rewind.kind == "init" else None

    @property
    def masks(self) -> Masks:
        """Which weights are alive."""
        return self.plugin.masks

    def run(self, train: Train, on_phase: Callable[[Cycles], None] | None = None) -> list[Metrics]:
        """Runs all that is left, and returns the history.

        Args:
            train: trains the model from where it stands and returns its metrics; it makes a fresh optimizer. It calls
                `run.reached(step)` after each step when rewinding to a step.
            on_phase: called just before each training and at the end, when the state is consistent: save then.

        Raises:
            ValueError: training never reached the step to rewind to.
        """
        if self.variant != "none":
            self.plugin.warn_if_nothing_can_die()
        try:
            while not self.done:
                if not self._resumed:
                    self.plugin.mark_start()
                    if on_phase is not None:
                        on_phase(self)
                self._resumed = False
                again = self.cycle > 0 or self.phase == "retrain"
                start = self.rewind.step if again and self.rewind.kind == "step" else 0
                metrics = dict(
                    train(self.model, self.masks, Run(self, self.cycle, self.phase, start, self.rewind)) or {}
                )
                self._trainings += 1
                self._check_finite()
                if self.rewind.restores and self._snapshot is None:
                    raise ValueError(
                        f"training never called run.reached({self.rewind.step}), the step to rewind to: "
                        "call run.reached(step) after each step, and train for longer than that"
                    )
                if self.phase == "retrain":
                    self._activate()
                    self._next_cycle()
                    continue
                self.history.append(self._row(metrics))
                if self.cycle == self.cycles:
                    self.done = True
                else:
                    self._prune()
            if on_phase is not None:
                on_phase(self)
        except Exception as error:
            error.history = self.history  # type: ignore[attr-defined]  # what was computed stays
            raise
        finally:
            self.plugin.detach()
        return self.history

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands, without the model's weights (the trainer saves those)."""
        return {
            "schema": _SCHEMA,
            "cycle": self.cycle,
            "phase": self.phase,
            "done": self.done,
            "trainings": self._trainings,
            "alive_at_start": self._alive_at_start,
            "removed": dict(self._removed),
            "history": [dict(row) for row in self.history],
            "masks": self.masks.state_dict(),
            "plugin": self.plugin.state_dict(),
            "snapshot": None if self._snapshot is None else self._snapshot.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict()` was taken; `run()` then continues with the training that was under way.

        The model's weights must have been loaded before.

        Raises:
            ValueError: the state is damaged, or of another model; nothing is changed then.
        """
        try:
            if state["schema"] != _SCHEMA:
                raise ValueError(f"not a state of schema {_SCHEMA}")
            self.plugin.unpack(state["plugin"])
            snapshot = None if state["snapshot"] is None else Snapshot.from_state_dict(state["snapshot"])
            if snapshot is not None:
                snapshot.check(self.model)
            elif self.rewind.kind == "init":
                raise ValueError("damaged state of the loop: no snapshot to rewind to")
            numbers = {key: state[key] for key in ("cycle", "trainings", "alive_at_start")}
            for key, number in numbers.items():
                if type(number) is not int or number < 0:
                    raise ValueError(f"damaged state of the loop: {key} is {number!r}")
            phase, done = state["phase"], state["done"]
            if phase not in ("train", "retrain") or not isinstance(done, bool) or numbers["cycle"] > self.cycles:
                raise ValueError(f"damaged state of the loop: cycle {numbers['cycle']}, phase {phase!r}, done {done!r}")
            removed, history = dict(state["removed"]), [dict(row) for row in state["history"]]
            if not {"pruned", "activated"} <= set(removed):
                raise ValueError("damaged state of the loop: how many weights went last is missing")
            self.masks.load_state_dict(state["masks"])  # changes nothing if it raises; nothing after it does
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"damaged state of the loop: {type(error).__name__} {error}") from error
        self.plugin.load_state_dict(state["plugin"])
        self._snapshot = snapshot
        self.cycle, self.phase, self.done = numbers["cycle"], phase, done
        self._trainings, self._alive_at_start = numbers["trainings"], numbers["alive_at_start"]
        self._removed, self.history = removed, history
        self._resumed = not self.done

    def _reached(self, step: int) -> None:
        if self._snapshot is None and self.rewind.kind == "step" and step == self.rewind.step:
            self._snapshot = Snapshot(self.model)

    def _went_back(self, step: int) -> None:
        if self.rewind.kind == "step" and step < self.rewind.step:
            self._snapshot = None

    def _check_finite(self) -> None:
        for name, parameter in self.model.named_parameters():
            values = parameter.detach()
            # A sum is several times faster, and finite only if every value is; it may overflow, though.
            if parameter.is_floating_point() and not (
                bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
            ):
                raise FloatingPointError(
                    f"{name} has weights that are not finite after the training of cycle {self.cycle}: "
                    "lower the learning rate, or clip the gradients"
                )

    def _row(self, metrics: Metrics) -> Metrics:
        alive = self.masks.alive
        negative = sum(count_true(self.masks.weight(n).detach() < 0) for n in self.masks)
        return {
            "cycle": self.cycle,
            "density": alive / self.masks.total,
            "alive": alive,
            "total": self.masks.total,
            "negative_share": negative / alive if alive else None,
            "trainings": self._trainings - 1,
            "shortfall": 0,
            **self._removed,
            **metrics,
        }

    def _prune(self) -> None:
        """The pruner's part, after the training that the row describes; AP's too, unless a retraining comes first."""
        self._alive_at_start = self.masks.alive
        total, own = self._split()
        self._removed = {"pruned": 0, "activated": 0}
        if total > own:
            self._removed["pruned"] = self._by_pruner(total - own)
        if self.variant == "pro":
            self._rewind()
            self.phase = "retrain"
            return
        if own:
            self._activate()
        self._next_cycle()

    def _split(self) -> tuple[int, int]:
        if self.variant in ("lite", "pro"):
            return split(self._alive_at_start, self.amount, self.rate)
        total = check_share(self.amount, "amount", self._alive_at_start)
        return total, total if self.variant == "solo" else 0

    def _by_pruner(self, count: int) -> int:
        """Exactly `count` weights by the pruner, whatever kind it is."""
        before = self.masks.alive
        if count >= before:
            raise ValueError(f"cannot remove {count} of the {before} weights that are alive")
        if hasattr(self.pruner, "prune"):
            self.pruner.prune(self.model, self.masks, amount=count / before, batches=self.batches, loss_fn=self.loss_fn)
        else:
            self.masks.prune(self.pruner(self.model, self.masks), count=count)
        self.plugin.absorb()  # what the pruner only zeroed
        return before - self.masks.alive

    def _activate(self) -> None:
        _, own = self._split()
        if self.by_pruner:
            self._removed["activated"] = self._by_pruner(own) if own else 0
            return
        chosen = self.plugin.preview(own)
        self._removed |= self._overlaps(chosen)
        missing = own - chosen.total
        self.masks.remove(chosen)
        self._removed["activated"] = chosen.total
        if missing:
            warn(
                f"cycle {self.cycle}: AP found {chosen.total} of the {own} weights that it should remove; this arm "
                "ends here, since its density would no longer equal the other arms'"
            )
            self.history[-1]["shortfall"] = missing
            self.done = True

    @torch.no_grad()
    def _overlaps(self, chosen: Selection) -> Metrics:
        """The share of AP's choice that its most suspicious alternatives would have taken as well."""
        if not chosen.total:
            return {}
        smallest = self.plugin.preview(chosen.total, criterion="smallest-negative")
        overlaps: Metrics = {"overlap_smallest_negative": chosen.overlap(smallest)}
        scores = None
        if getattr(self.pruner, "scope", None) == "global" and hasattr(self.pruner, "scores"):
            with torch.enable_grad():
                scores = self.pruner.scores(self.model, self.masks, batches=self.batches, loss_fn=self.loss_fn)
        elif self.pruner is not None and not hasattr(self.pruner, "prune"):
            scores = self.pruner(self.model, self.masks)
        if scores is not None:
            next_ones = lowest(scores, {name: self.masks[name] for name in self.masks}, chosen.total)
            overlaps["overlap_pruner"] = chosen.overlap(next_ones)
        return overlaps

    def _next_cycle(self) -> None:
        if self.done:
            return
        self._rewind()
        self.phase = "train"
        self.cycle += 1

    def _rewind(self) -> None:
        if self.rewind.restores:
            assert self._snapshot is not None
            self._snapshot.restore(self.model)
        self.masks.apply_()


def prune_iteratively(
    model: nn.Module,
    train: Train,
    pruner: Any = None,
    cycles: int = 20,
    amount: float = 0.2,
    ap: str = "lite",
    rate: float = 0.02,
    criterion: str | Criterion = "least-moved-negative",
    where: str | Iterable[str] = "all",
    rewind: str | Rewind = "init",
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    **options: Any,
) -> list[Metrics]:
    """Prunes a model iteratively, with AP or without, and returns one row for each trained network.

    Args:
        model: what to prune, at its initial weights. It ends as the last trained network.
        train: `train(model, masks, run)` trains it from where it stands, with a fresh optimizer, and returns its
            metrics as a dict. `run.start_step` is where the learning-rate schedule starts, `run.cycle` counts the
            prunings, and `run.reached(step)` is to be called after each step when rewinding to a step.
        pruner, cycles, amount, ap, rate, criterion, where, rewind, batches, loss_fn: see `Cycles`.
        options: `allocation`, `steps_per_epoch`, `masks`, `example_input`, `seed`, see `Cycles`.

    Returns:
        n + 1 rows for n cycles, fewer when AP ran out of candidates (`shortfall` in the last row says by how many):
        cycle, density, alive, total, negative_share, trainings (before this network), pruned, activated, the overlaps
        of AP's choice, and what `train` returned.

    Raises:
        FloatingPointError: a weight became NaN or infinite. An error's `history` attribute holds the rows so far.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> def train(model, masks, run):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     loss = model(torch.ones(4, 8)).square().mean()
        ...     loss.backward(); _ = optimizer.step()
        ...     return {"loss": float(loss.detach())}
        >>> def magnitude(model, masks):
        ...     return {name: masks.weight(name).detach().abs() for name in masks}
        >>> history = prune_iteratively(model, train, magnitude, cycles=2, amount=0.25, rate=0.05)
        >>> [row["density"] for row in history]
        [1.0, 0.75, 0.5625]
    """
    loop = Cycles(
        model,
        pruner,
        cycles=cycles,
        amount=amount,
        ap=ap,
        rate=rate,
        criterion=criterion,
        where=where,
        rewind=rewind,
        batches=batches,
        loss_fn=loss_fn,
        **options,
    )
    return loop.run(train)
