"""Structured pruning on torch-pruning: channels are removed physically, masks and optimizers follow.

torch-pruning groups coupled channels and says how important each one is. How many go is decided here, so that counts
and ties are exact, and what `ap.channels` knows of the graph removes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ap.activations.ranges import is_activation
from ap.channels import Channels
from ap.compaction import shrink_
from ap.graph import trace
from ap.graph_trace import clean_name, unwrap
from ap.masks import Masks, check_share
from ap.ranking import apportion, lowest
from ap.slots import Kept
from pruners.base import Batches, LossFn, Pruner, check_owner, repeatable, undisturbed
from pruners.schedules import exponential, removed_by


@dataclass
class Group:
    """Channels that can only go together, over all the layers that make or read them."""

    name: str  # of the layer that makes them
    importance: Tensor  # [channels]
    makers: list[tuple[str, Tensor, Tensor]]  # layers whose rows these are, the rows, and each row's channel


class Structured(Pruner):
    """Removes whole channels, physically. `amount` is a share of the channels that can go.

    Parameters stay the same objects with a smaller shape. Masks follow, and so do the state of every optimizer that
    `masks.bind` knows and AP's memory of where training started; `masks.total` goes on counting what was removed.

    Channels that cannot: the model's outputs, attention's width, what LayerNorm reads, grouped convolutions, whatever
    the graph does not let follow. Every group of channels keeps at least one.

    Args:
        example_input: a tensor [N, …] or tuple of the forward pass's arguments; not needed where there are batches.
        ranking: "local", every group loses the same share (torch-pruning's default), or "global".
        ignored: names of layers whose channels stay.
    """

    scope = "group"
    takes = ("rounds",)
    changes_shapes = True

    def __init__(
        self,
        example_input: Any = None,
        ranking: str = "local",
        ignored: Iterable[str] = (),
    ) -> None:
        if ranking not in ("local", "global"):
            raise ValueError(f"ranking must be 'local' or 'global', not {ranking!r}")
        torch_pruning()
        self.example_input = example_input
        self.ranking = ranking
        self.ignored = [ignored] if isinstance(ignored, str) else list(ignored)

    def importance(self, model: nn.Module, batches: Batches | None, loss_fn: LossFn | None) -> Any:
        """What torch-pruning calls with each group: a score a channel, or None to leave the group alone."""
        raise TypeError(f"{type(self).__name__} defines no importance()")

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """Each weight's score is that of its output channel; inf where the channel cannot go."""
        scores = {name: torch.full(masks[name].shape, torch.inf) for name in masks}
        for group in self.groups(model, batches, loss_fn)[0]:
            for path, rows, channels in group.makers:
                name = f"{path}.weight" if path else "weight"
                if name in scores:
                    shape = (-1, *(1,) * (scores[name].dim() - 1))
                    scores[name][rows] = group.importance.cpu()[channels].float().view(shape)
        return {name: score.to(masks[name].device) for name, score in scores.items()}

    def prune(
        self,
        model: nn.Module,
        masks: Masks,
        amount: float = 0.2,
        batches: Batches | None = None,
        loss_fn: LossFn | None = None,
    ) -> int:
        """Removes round(amount × channels) channels, and returns how many living weights went with them.

        Raises:
            ImportError: torch-pruning is not installed.
            ValueError: an amount outside (0, 1), another model's masks, missing data, or no channel that can go.
        """
        check_share(amount, "amount", 1)
        check_owner(model, masks)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise TypeError(
                f"{self.name} makes layers smaller, which DistributedDataParallel's buckets do not follow: prune "
                "model.module with the same batches on every rank, and wrap it again"
            )
        if self.needs_data:
            self.require_batches(batches)
            if self.needs_loss:
                self.require_data(batches, loss_fn)
        if batches is not None:
            batches = repeatable(batches)
        gone, first = 0, 0
        for done in range(1, self.rounds + 1):
            groups, graph = self.groups(model, batches, loss_fn)
            now = sum(group.importance.numel() for group in groups)
            first = first or now
            left = first - removed_by(exponential, done / self.rounds, first, round(amount * first))
            ties = {group.name: graph.of(group.name) for group in groups}
            tied = {
                ties[group.name][channel] for group, channels in self.choose(groups, now - left) for channel in channels
            }
            kept: dict[nn.Parameter, Kept] = {}
            for cut in graph.cuts(tied, fold=False):
                kept |= shrink_(cut)
            gone += masks.follow(kept)
        return gone

    def choose(self, groups: list[Group], wanted: int) -> list[tuple[Group, list[int]]]:
        """Which channels go: exactly as many as wanted, or all but one of each group where that is fewer."""
        if not groups:
            raise ValueError(f"{self.name}: no channel of this model can be removed")
        scores = {group.name: group.importance.double().cpu() for group in groups}
        eligible = {}
        for name, score in scores.items():
            eligible[name] = torch.ones_like(score, dtype=torch.bool)
            eligible[name][score.argmax()] = False
        room = [score.numel() - 1 for score in scores.values()]
        count = max(0, min(self.count(groups, wanted), sum(room)))
        if self.ranking == "global":
            chosen = lowest(scores, eligible, count)
        else:
            chosen = {
                name: lowest({name: scores[name]}, {name: eligible[name]}, int(share))[name]
                for name, share in zip(scores, apportion(count, room), strict=True)
            }
        return [(group, chosen[group.name].nonzero()[:, 0].tolist()) for group in groups]

    def count(self, groups: list[Group], wanted: int) -> int:
        """How many channels go, where a method knows better than the amount asked for."""
        return wanted

    def groups(self, model: nn.Module, batches: Batches | None, loss_fn: LossFn | None) -> tuple[list[Group], Channels]:
        """The groups of channels that can go, with the importance of each channel, and the model's channels."""
        plain = unwrap(model)
        example = self._example(plain, batches)
        with undisturbed(plain), gradients_kept(plain):
            channels = Channels(trace(plain, example))
            free = channels.free()
            with torch.enable_grad():
                dependencies = _dependencies(plain, example)
                importance = self.importance(plain, batches, loss_fn)
            names = {module: clean_name(name) for name, module in plain.named_modules()}
            ignored = {name for name in names.values() if name in self.ignored}
            if unknown_ones := [name for name in self.ignored if name not in ignored]:
                raise ValueError(f"ignored: there is no layer {', '.join(unknown_ones)}")
            found = []
            kinds = [nn.modules.conv._ConvNd, nn.Linear]
            for group in dependencies.get_all_groups(root_module_types=kinds):
                root = group[0].dep.target.module
                makers = [
                    (names[dep.target.module], torch.as_tensor(item.idxs), torch.as_tensor(item.root_idxs))
                    for item in group
                    for dep in [item.dep]
                    if isinstance(dep.target.module, (nn.Linear, _ConvNd))
                    and dependencies.is_out_channel_pruning_fn(dep.handler)
                ]
                if any(not free.get(name, False) or name in ignored for name, *_ in makers):
                    continue
                with torch.no_grad():
                    score = importance(group)
                if score is None:
                    continue
                score = torch.nan_to_num(score.detach(), nan=0.0)  # 0 / 0 where a whole group's importance is zero
                found.append(Group(names[root], score, makers))
        return found, channels

    def _example(self, model: nn.Module, batches: Batches | None) -> Any:
        device = next(model.parameters()).device
        example = self.example_input
        if example is None:
            if batches is None:
                raise ValueError(f"{self.name} runs the model once: give it batches=, or create it with example_input=")
            batch = next(iter(batches))
            example = batch[0] if isinstance(batch, (tuple, list)) else batch
            example = example[:1]
        if isinstance(example, (tuple, list)):
            return tuple(x.to(device) if isinstance(x, Tensor) else x for x in example)
        return example.to(device)


def _dependencies(model: nn.Module, example: Any) -> Any:
    """torch-pruning's graph of the model, in which activations pass everything on: they tie no channels together.

    With their parameters in it, PReLU's or one's own, it would lose track of a flattening behind them.
    """
    tp = torch_pruning()
    graph = tp.DependencyGraph()
    graph.REGISTERED_PRUNERS.pop(tp.ops.OPTYPE.PRELU)
    activations = [module for module in model.modules() if is_activation(module) and "forward" not in vars(module)]
    own = [parameter for module in activations for parameter in module.parameters()]
    for module in activations:
        module.forward = _pass_on  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of parameters outside of layers, whose width cannot go
            return graph.build_dependency(model, example_inputs=example, ignored_params=own)
    finally:
        for module in activations:
            del module.forward


def _pass_on(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """The parameters start without gradients, and have their own back afterwards."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def torch_pruning() -> Any:
    """The library, imported when it is needed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_pruning as tp
    except ImportError as error:
        raise ImportError(
            "structured pruners use torch-pruning, which is missing: pip install 'activate-while-pruning[structured]'"
        ) from error
    return tp
