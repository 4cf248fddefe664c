"""Pruning by measured deadness: APoZ (Hu et al. 2016) and Demon Pruning (Dufort-Labbé et al. 2024), structured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ap.dnr import DNRMonitor
from ap.graph import layer_contexts
from ap.graph_trace import clean_name, unwrap
from pruners.base import Batches, LossFn, register, run_batches
from pruners.structured import Group, Structured


@register("structured-apoz")
class StructuredAPoZ(Structured):
    """1 − the channel's measured dead rate: the most dead channels go first (APoZ for any activation that can die).

    Channels that feed no such activation stay. Where several activations read a group of channels their mean counts.
    """

    needs_data = True
    needs_loss = False

    def importance(self, model: nn.Module, batches: Batches | None, loss_fn: LossFn | None) -> Any:
        """1 − dead rate a channel, None for groups that feed no activation that can die."""
        rates = dead_rates(model, self.require_batches(batches), self.example_input)
        names = {module: clean_name(name) for name, module in model.named_modules()}

        def alive(group: Any) -> Tensor | None:
            total, readings = torch.zeros(len(group[0].idxs)), 0
            for item in group:
                rate = rates.get(names.get(item.dep.target.module, ""))
                if rate is not None and item.dep.handler is not None and len(rate) > max(item.idxs, default=0):
                    if getattr(item.dep.handler, "__name__", "") == "prune_in_channels":
                        continue
                    total[torch.as_tensor(item.root_idxs)] += 1 - rate[torch.as_tensor(item.idxs)]
                    readings += 1
            return total / readings if readings else None

        return alive


@register("structured-demp")
class StructuredDemP(StructuredAPoZ):
    """Demon Pruning (Dufort-Labbé et al. 2024, arXiv 2403.07688): units go as they die.

    Our reading of its public description: whenever it is called, the channels that are dead for every input measured
    go, at most the share `amount` of all of them, fewer where fewer are dead. What the paper adds to training to let
    units die (a one-cycle penalty on the norms' scales, noise on the living) is the trainer's part and not done here.
    """

    def __init__(self, example_input: Any = None, ranking: str = "global", **options: Any) -> None:
        super().__init__(example_input, ranking, **options)

    def count(self, groups: list[Group], wanted: int) -> int:
        """As many as are dead, at most as many as wanted."""
        return min(wanted, sum(int((group.importance <= 0).sum()) for group in groups))


def dead_rates(model: nn.Module, batches: Batches, example_input: Any = None) -> dict[str, Tensor]:
    """The dead rate of each layer's output channels, by the activation that they feed, float32 [C] in [0, 1].

    Over the batches of all ranks, in evaluation mode.

    Layers that feed none that can die, or one whose channels are not theirs, are left out.
    """
    plain = unwrap(model)
    monitor = DNRMonitor(plain, every=1)
    with monitor:
        run_batches(plain, batches)
    report = monitor.sync("eval")
    rates = {}
    for name, context in layer_contexts(plain, example_input).items():
        layer = report.layers.get(context.activation or "")
        if layer is None or not layer.can_die:
            continue
        rate = layer.dead_rate_per_channel().cpu()
        module = plain.get_submodule(name)
        if len(rate) == getattr(module, "out_channels", getattr(module, "out_features", -1)):
            rates[name] = rate
    return rates
