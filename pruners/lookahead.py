"""Lookahead: magnitude that sees the neighbouring layers (Park et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ap.graph import trace
from ap.masks import Masks
from ap.warn import warn
from pruners.base import Batches, LossFn, Pruner, register
from pruners.energy import Energies


@register("lookahead")
class Lookahead(Pruner):
    """w² · Σ (previous layers' w² into this input) · Σ (next layers' w² out of this output), per layer.

    With BatchNorm, also (γ/√(var + ε))² of the previous and of this layer. The model's real graph is followed:
    additions, shortcuts, concatenations, flattening. Other norms count with γ² (ours). Where the graph cannot be
    followed (attention, products), that side counts as 1, and a warning names the layer.

    Args:
        example_input: for models whose graph cannot be traced without.
    """

    scope = "layer"

    def __init__(self, example_input: Any = None) -> None:
        self.example_input = example_input

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """The lookahead distortion, squared (Park et al. 2020, equation 5), float32."""
        energies = Energies(trace(model, self.example_input))
        scores = {}
        lost = []
        for name in masks:
            path, _, attribute = name.rpartition(".")
            before = energies.into(path) if attribute == "weight" else None
            after = energies.out_of(path) if attribute == "weight" else None
            if before is None or after is None:
                lost.append(
                    f"{name} ({'behind' if before is not None else 'before' if after is not None else 'around'})"
                )
            scores[name] = _score(masks.weight(name).detach(), masks.module(name), before, after)
        if lost:
            warn(f"lookahead cannot follow the graph at {', '.join(lost)}; that side counts as 1")
        return scores


def _score(weight: Tensor, module: nn.Module, before: Tensor | None, after: Tensor | None) -> Tensor:
    """w² · before (of its input channel) · after (of its output channel)."""
    score = weight.float().square()
    trailing = (1,) * (weight.dim() - 2)
    groups = int(getattr(module, "groups", 1))
    transposed = bool(getattr(module, "transposed", False))
    # Axis 0 of a weight is its output channels, of a transposed convolution's its input channels.
    along_rows, along_columns = (before, after) if transposed else (after, before)
    rows, columns = weight.shape[:2]
    if along_rows is not None:
        score *= along_rows.to(score).expand(rows).view(-1, 1, *trailing)
    if along_columns is not None:
        # A group's rows see only their own group's columns.
        each = along_columns.to(score).expand(groups * columns).view(groups, columns)
        score *= each.repeat_interleave(rows // groups, dim=0).view(rows, columns, *trailing)
    return score
