"""What every pruner shares: the interface, the registry, gradients without side effects, and checks of the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ap.masks import Masks, Scope
from ap.names import unknown

Batches = Iterable[Any]
LossFn = Callable[[Any, Any], Tensor]
ENTRY_POINTS = "activate_while_pruning.pruners"
_REGISTRY: dict[str, type[Pruner]] = {}
_P = TypeVar("_P", bound="type[Pruner]")


class Pruner:
    """A pruning criterion: scores of the weights, higher = keep. A subclass defines `scores` and registers a name.

    Attributes:
        name: under which it is registered.
        scope: what is compared with each other, see `Masks.prune`.
        needs_data: whether it needs `batches` and `loss_fn`.

    Example:
        >>> @register("largest-first")
        ... class LargestFirst(Pruner):
        ...     def scores(self, model, masks, batches=None, loss_fn=None):
        ...         return {name: -masks.weight(name).detach().abs() for name in masks}
        >>> create("largest-first").name
        'largest-first'
        >>> del _REGISTRY["largest-first"]
    """

    name: ClassVar[str] = ""
    scope: Scope = "global"
    needs_data: bool = False

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """One round's scores.

        Args:
            model: left as it is: weights, gradients, buffers and mode.
            masks: the model's masks; dead weights' scores do not matter.
            batches: (inputs, targets) pairs.
            loss_fn: `loss_fn(outputs, targets)`, a scalar.

        Returns:
            For each name of `masks` a tensor of the weight's shape.
        """
        raise TypeError(f"{type(self).__name__} defines no scores()")

    def prune(
        self,
        model: nn.Module,
        masks: Masks,
        amount: float = 0.2,
        batches: Batches | None = None,
        loss_fn: LossFn | None = None,
    ) -> int:
        """All rounds: removes round(amount × alive) weights and returns how many went.

        Raises:
            ValueError: an amount outside (0, 1), missing data, scores that carry no information.
        """
        if self.needs_data:
            self.require_data(batches, loss_fn)
        scores = checked(self.scores(model, masks, batches=batches, loss_fn=loss_fn), masks, self.name)
        return masks.prune(scores, amount=amount, scope=self.scope)

    def require_data(self, batches: Batches | None, loss_fn: LossFn | None) -> tuple[Batches, LossFn]:
        """Both, or a ValueError that says what is missing."""
        if batches is None or loss_fn is None:
            missing = " and ".join(n for n, v in (("batches=", batches), ("loss_fn=", loss_fn)) if v is None)
            raise ValueError(f"the pruner {self.name!r} scores weights by data: give it {missing}")
        return batches, loss_fn

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, scope={self.scope!r}, needs_data={self.needs_data})"


def register(name: str) -> Callable[[_P], _P]:
    """Class decorator: makes a pruner available under a name."""

    def add(cls: _P) -> _P:
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def names() -> list[str]:
    """The registered pruners, those of other packages' entry points included."""
    return sorted({*_REGISTRY, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def create(name: str, **options: Any) -> Pruner:
    """A pruner by name; `options` are its own.

    Raises:
        ValueError: an unknown name (the close ones are listed).
        TypeError: an option it does not have.

    Example:
        >>> import pruners
        >>> pruners.create("magnitude")
        Magnitude(name='magnitude', scope='global', needs_data=False)
    """
    if name not in _REGISTRY:
        for point in entry_points(group=ENTRY_POINTS):
            if point.name == name:
                register(name)(point.load())
                break
        else:
            raise unknown("pruner", name, names())
    return _REGISTRY[name](**options)


def checked(scores: Mapping[str, Tensor], masks: Masks, who: str) -> Mapping[str, Tensor]:
    """The scores, if they say anything: finite on every living weight, and not all zero.

    Raises:
        ValueError: naming the layer that has a score which is not finite, or when every score is zero.
    """
    informative = False
    for name in masks:
        if name not in scores:
            raise ValueError(f"{who}: no score for {name}")
        score = scores[name].detach()
        total = score.sum()
        if not bool(torch.isfinite(total)) and not bool((torch.isfinite(score) | ~masks[name]).all()):
            raise ValueError(f"{who}: {name} has scores that are not finite")
        informative = informative or bool(((score != 0) & masks[name]).any())
    if not informative:
        raise ValueError(
            f"{who}: every score is zero, so they rank nothing. Do the gradients vanish, e.g. behind a layer that was "
            "initialised with zeros?"
        )
    return scores


@contextmanager
def undisturbed(model: nn.Module, training: bool = False) -> Iterator[nn.Module]:
    """Runs the model in evaluation (or training) mode, and puts modes, buffers and `requires_grad` back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()] if training else []
    model.train(training)
    for parameter in frozen:
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def summed_gradients(model: nn.Module, masks: Masks, batches: Batches, loss_fn: LossFn) -> dict[str, Tensor]:
    """The signed gradients of the masked weights, summed over all batches (and over ranks), in evaluation mode.

    The parameters' `.grad` is neither read nor written.
    """
    weights = {name: masks.weight(name) for name in masks}
    sums = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
    seen = 0
    with undisturbed(model), torch.enable_grad():
        for inputs, targets in on_device(batches, model):
            loss = loss_fn(model(inputs), targets)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient
            seen += 1
    if not seen:
        raise ValueError("no batches: the iterable is empty (a generator that was used up?)")
    reduce_over_ranks(sums.values())
    return sums


def on_device(batches: Batches, model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """(inputs, targets) pairs on the model's device."""
    device = next(model.parameters()).device
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"batches must be (inputs, targets) pairs, got a {type(batch).__name__}")
        inputs, targets = (part.to(device) if isinstance(part, Tensor) else part for part in batch)
        yield inputs, targets


def reduce_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Sums each tensor over the ranks of torch.distributed, so that every rank prunes the same weights."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
