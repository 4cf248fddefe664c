"""Where activate-while-pruning can matter in a model, layer by layer.  [ours]

The argument of Liu, Ghosh and Motani (2023) [paper]: where a layer's input is rectified (≥ 0), a negative weight can
only push a pre-activation down, so removing it can only wake the rectifier behind it. It does not hold where inputs can
be negative (the first layer, after a LayerNorm) or nothing that can die follows (the classifier); it is weakened where
BatchNorm re-centres what a removal shifted, or a residual addition comes before the rectifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ap.activations.ranges import call_dead_range, dead_range
from ap.dnr_report import align
from ap.graph import Node, contexts_of, trace
from ap.names import refuse_wrappers

_DEEP = 4  # measured (docs/results/depth.md): two such layers gain, seven lose; in between nothing is known


@dataclass(frozen=True)
class ExplainedLayer:
    """One row of `explain`.

    Attributes:
        name: dotted module path.
        kind: class name.
        weights: the number of its weights.
        input_rectified: every element of its input is ≥ 0.
        followed_by: what reads its output first: "BatchNorm2d", "add", "rectifier", "activation", "layer", "nothing" …
        activation: the first activation that its output feeds, by its name in the DNR report; None if none.
        activation_kind: what that is ("ReLU", "gelu").
        can_die: whether that activation's units can be dead; None without an activation.
        verdict: "holds", "weakened" or "fails": the argument for removing negative weights here.
        why: the reason, in a few words.
    """

    name: str
    kind: str
    weights: int
    input_rectified: bool
    followed_by: str
    activation: str | None
    activation_kind: str | None
    can_die: bool | None
    verdict: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """The rows of `explain`, in order of execution; `print` shows a table."""

    rows: list[ExplainedLayer]

    def __str__(self) -> str:
        table = [["layer", "kind", "weights", "input", "followed by", "first activation", "can die", "AP's argument"]]
        for row in self.rows:
            activation = f"{row.activation} ({row.activation_kind})" if row.activation is not None else "-"
            can_die = "-" if row.can_die is None else "yes" if row.can_die else "no"
            rectified = "rectified" if row.input_rectified else "any sign"
            verdict = row.verdict + (f": {row.why}" if row.why else "")
            table.append(
                [row.name, row.kind, f"{row.weights:,}", rectified, row.followed_by, activation, can_die, verdict]
            )
        lines = align(table, right=(2,))
        rule = "-" * max(len(line) for line in lines)
        return "\n".join([lines[0], rule, *lines[1:], rule, self.summary, *self.warnings])

    @property
    def summary(self) -> str:
        """One sentence on how much of the model the argument covers."""
        total = sum(row.weights for row in self.rows)

        def share(verdict: str) -> str:
            rows = [row for row in self.rows if row.verdict == verdict]
            percent = 100 * sum(row.weights for row in rows) / max(1, total)
            return f"{verdict} for {len(rows)} ({percent:.1f} % of the weights)"

        layers = f"{len(self.rows)} layer" + "s" * (len(self.rows) != 1)
        return f"AP's argument, over {layers}: " + ", ".join(map(share, ("holds", "weakened", "fails")))

    @property
    def warnings(self) -> list[str]:
        """What can go wrong although the argument holds; empty if nothing is known."""
        longest = run = 0
        for row in self.rows:
            run = run + 1 if row.verdict == "holds" else 0
            longest = max(longest, run)
        if longest < _DEEP:
            return []
        return [
            f"Careful: {longest} of these layers follow one another without normalisation. Removing negative weights "
            "only raises the mean of each layer's output, the next layer amplifies it, and a rewound network may no "
            'longer train. Compare with no AP, or take criterion="least-moved".'
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types, ready for JSON."""
        return {"summary": self.summary, "warnings": self.warnings, "rows": [vars(row).copy() for row in self.rows]}


def explain(model: nn.Module, example_input: Any = None) -> Explanation:
    """Tells, layer by layer, whether its neurons can die, whether its input is rectified, and what follows it.

    Args:
        model: any module.
        example_input: a tensor, or a tuple of the forward pass's arguments; needed only where torch.fx cannot trace the
            model, which is then run once in eval mode.

    Raises:
        ValueError: the model cannot be traced and there is no `example_input`.
        TypeError: the model is wrapped in DataParallel or FSDP, or no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> print(explain(model))
        layer  kind    weights  input      followed by  first activation  can die  AP's argument
        --------------------------------------------------------------------------------------------------------
        0      Linear       32  any sign   rectifier    1 (ReLU)          yes      fails: inputs can be negative
        2      Linear       64  rectified  rectifier    3 (ReLU)          yes      holds
        4      Linear       16  rectified  nothing      -                 -        fails: no activation follows
        --------------------------------------------------------------------------------------------------------
        AP's argument, over 3 layers: holds for 1 (57.1 % of the weights), weakened for 0 (0.0 % of the weights), \
fails for 2 (42.9 % of the weights)
    """
    refuse_wrappers(model)
    graph = trace(model, example_input)
    modules = {node.target: node for node in graph.layers()}
    rows = []
    for name, context in contexts_of(graph).items():
        node = modules.get(name)
        if node is None:  # a projection inside of attention, whose weights are the attention's
            continue
        between, activation = graph.path_to_activation(node)
        verdict, why = _verdict(context.input_rectified, between, activation, context.feeds_rectifier)
        rows.append(
            ExplainedLayer(
                name=name,
                kind=context.kind,
                weights=_weights(node),
                input_rectified=context.input_rectified,
                followed_by=_class_of_norm(between) if context.followed_by == "norm" else context.followed_by,
                activation=context.activation,
                activation_kind=activation.op if activation is not None else None,
                can_die=None if activation is None else _can_die(activation),
                verdict=verdict,
                why=why,
            )
        )
    if not rows:
        raise ValueError(
            f"{type(model).__name__} has no layer with weights (linear, convolution, attention) to explain"
        )
    return Explanation(rows)


def _weights(node: Node) -> int:
    assert node.module is not None
    return sum(p.numel() for name, p in node.module.named_parameters() if p.dim() > 1 and "bias" not in name)


def _can_die(activation: Node) -> bool:
    if activation.module is not None:
        return dead_range(activation.module) is not None
    function = getattr(Tensor, activation.function) if isinstance(activation.function, str) else activation.function
    return call_dead_range(function, activation.args, activation.kwargs) is not None


def _class_of_norm(between: list[Node]) -> str:
    return next((node.op for node in between if node.kind == "norm"), "norm")


def _verdict(rectified: bool, between: list[Node], activation: Node | None, feeds_rectifier: bool) -> tuple[str, str]:
    if activation is None:
        return "fails", "no activation follows"
    if not _can_die(activation):
        return "fails", f"{activation.op} cannot die"
    if not feeds_rectifier:
        return "fails", f"{activation.op} is no rectifier"
    if not rectified:
        return "fails", "inputs can be negative"
    reasons = []
    norms = [node.op for node in between if node.kind == "norm"]
    if norms:
        reasons.append(f"{norms[0]} re-centres")
    if any(node.kind in ("add", "sub") for node in between):
        reasons.append("a residual is added")
    others = [node.op for node in between if node.kind in ("mul", "other")]
    if others:
        reasons.append(f"{others[0]} comes between")
    return ("weakened", "; ".join(reasons)) if reasons else ("holds", "")
