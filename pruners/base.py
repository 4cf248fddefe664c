"""What every pruner shares: the interface, the registry, gradients without side effects, and checks of the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ap.graph_trace import unwrap
from ap.masks import Masks, Scope, check_share
from ap.names import unknown
from ap.ranking import pieces
from ap.ranks import reduce_over_ranks
from ap.warn import warn
from pruners.densities import check_density, remove_lowest
from pruners.schedules import exponential, removed_by

Batches = Iterable[Any]
LossFn = Callable[[Any, Any], Tensor]
ScoreFn = Callable[[nn.Module, Masks], Mapping[str, Tensor]]
ENTRY_POINTS = "activate_while_pruning.pruners"
_REGISTRY: dict[str, type[Pruner] | ScoreFn] = {}
_P = TypeVar("_P", bound="type[Pruner] | ScoreFn")


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
    needs_loss: bool = True  # whether the data must come with a loss_fn; of no meaning without needs_data
    takes: ClassVar[tuple[str, ...]] = ("rounds", "density")  # which of `create`'s common options make sense
    rounds: int = 1
    density: str = "scope"

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

        With n rounds, ρ^(k/n) of the weights are left after round k, ρ = 1 − amount.

        Raises:
            ValueError: another model's masks, an amount outside (0, 1), missing data, scores that carry no information.
        """
        check_owner(model, masks)
        alive = masks.alive
        gone = check_share(amount, "amount", alive)
        if self.needs_data:
            if self.needs_loss:
                self.require_data(batches, loss_fn)
            self.require_batches(batches)
        if self.rounds > 1 and batches is not None:
            batches = repeatable(batches)
        for done in range(1, self.rounds + 1):
            count = masks.alive - (alive - removed_by(exponential, done / self.rounds, alive, gone))
            if count > 0:
                scores = self.scores(model, masks, batches=batches, loss_fn=loss_fn)
                checked(scores, masks, self.name, begun=done > 1)
                remove_lowest(masks, self.protected(scores, masks), count, self.density, self.scope)
        return alive - masks.alive

    def protected(self, scores: Mapping[str, Tensor], masks: Masks) -> Mapping[str, Tensor]:
        """The scores that a round goes by, where something must stay whatever its score; by default as they are."""
        return scores

    def require_batches(self, batches: Batches | None) -> Batches:
        """The batches, or a ValueError that says that they are missing."""
        if batches is None:
            raise ValueError(f"the pruner {self.name!r} scores weights by data: give it batches=")
        return batches

    def require_data(self, batches: Batches | None, loss_fn: LossFn | None) -> tuple[Batches, LossFn]:
        """Both, or a ValueError that says what is missing."""
        if batches is None or loss_fn is None:
            missing = " and ".join(n for n, v in (("batches=", batches), ("loss_fn=", loss_fn)) if v is None)
            raise ValueError(f"the pruner {self.name!r} scores weights by data: give it {missing}")
        return batches, loss_fn

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, scope={self.scope!r}, needs_data={self.needs_data})"


def check_owner(model: nn.Module, masks: Masks) -> None:
    """Raises ValueError where masks are of another model, which would be pruned in place of the one that was given."""
    held = {id(parameter) for parameter in model.parameters()}
    strange = next((name for name in masks if id(masks.weight(name)) not in held), None)
    if strange is not None:
        raise ValueError(
            f"these masks are of another model, this one does not hold their {strange}: was it copied? "
            "Masks(model) makes its own"
        )


def register(name: str) -> Callable[[_P], _P]:
    """Decorator: makes a pruner's class, or a function `(model, masks) -> scores`, available under a name.

    Example:
        >>> @register("positive-first")
        ... def positive_first(model, masks):
        ...     return {name: -masks.weight(name).detach() for name in masks}
        >>> create("positive-first")
        Function(name='positive-first', scope='global', needs_data=False)
        >>> del _REGISTRY["positive-first"]
    """

    def add(pruner: _P) -> _P:
        if isinstance(pruner, type):
            pruner.name = name  # type: ignore[attr-defined]
        _REGISTRY[name] = pruner
        return pruner

    return add


def names() -> list[str]:
    """The registered pruners, those of other packages' entry points included."""
    return sorted({*_REGISTRY, *(point.name for point in entry_points(group=ENTRY_POINTS))})


class Function(Pruner):
    """A plain function `(model, masks) -> scores` as a pruner.

    Args:
        function: its scores: for each name of `masks` a tensor of the weight's shape, higher = keep.
        scope: what is compared with each other.
        name: default, the function's own.

    Example:
        >>> pruner = create(lambda model, masks: {name: masks.weight(name).detach().abs() for name in masks})
        >>> pruner.prune(layer := nn.Linear(4, 5), Masks(layer), amount=0.5)
        10
    """

    def __init__(self, function: ScoreFn, scope: Scope = "global", name: str | None = None) -> None:
        self.function = function
        self.scope = scope
        self.name = name or getattr(function, "__name__", type(function).__name__)  # type: ignore[misc, assignment]

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """What the function says."""
        return self.function(model, masks)


def find(name: str) -> type[Pruner] | ScoreFn:
    """What is registered under a name, by this package, a decorator or another package's entry point.

    Raises:
        ValueError: an unknown name (the close ones are listed).
    """
    if name not in _REGISTRY:
        for point in entry_points(group=ENTRY_POINTS):
            if point.name == name:
                register(name)(point.load())
                break
        else:
            raise unknown("pruner", name, names())
    return _REGISTRY[name]


def create(
    name: str | Pruner | ScoreFn, *, rounds: int | None = None, density: str | None = None, **options: Any
) -> Pruner:
    """A pruner by name; `options` are its own.

    Args:
        name: a registered name, or a plain function `(model, masks) -> scores`; a pruner is passed through.
        rounds: prune in that many rounds of new scores, ρ^(k/n) of the weights left after round k; default: the
            pruner's own number, which is 1 (one-shot) but for SynFlow.
        density: how the weights that stay are spread over the layers: "scope" (default: as the scores say), "uniform"
            (every layer the same density) or "erk" (denser where a layer is small, see `pruners.densities`).

    Raises:
        ValueError: an unknown name (the close ones are listed), or a common option that this pruner cannot have.
        TypeError: an option it does not have.

    Example:
        >>> import pruners
        >>> pruners.create("magnitude")
        Magnitude(name='magnitude', scope='global', needs_data=False)
    """
    if isinstance(name, str):
        found = find(name)
        pruner = found(**options) if isinstance(found, type) else Function(found, name=name, **options)
    elif isinstance(name, Pruner):
        if options:
            raise TypeError(f"{name!r} is made already; options belong to its creation")
        pruner = name
    elif callable(name):
        pruner = Function(name, **options)
    else:
        raise TypeError(f"a pruner is a name, a Pruner or a function (model, masks) -> scores, not {name!r}")
    for option, value in (("rounds", rounds), ("density", density)):
        if value is not None and option not in pruner.takes:
            raise ValueError(f"the pruner {pruner.name!r} has no {option}: its own structure decides that")
    if rounds is not None:
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise ValueError(f"rounds must be a whole number, 1 or more, not {rounds!r}")
        pruner.rounds = rounds
    if density is not None:
        check_density(density)
        pruner.density = density
    return pruner


def checked(scores: Mapping[str, Tensor], masks: Masks, who: str, begun: bool = False) -> Mapping[str, Tensor]:
    """The scores, if they say anything: finite on every living weight, and not all zero.

    Args:
        begun: some rounds are over, so that what they pruned is what cut the network off: only warn of zeros.

    Raises:
        ValueError: naming the layer that has a score which is not finite, or when every score is zero.
    """
    informative = False
    for name in masks:
        if name not in scores:
            raise ValueError(f"{who}: no score for {name}")
        for score, alive in pieces(scores, name, masks[name]):
            assert alive is not None
            # A sum is cheap, and finite only if all are; it may overflow, though, and dead weights do not matter.
            if not bool(torch.isfinite(score.sum())) and not bool((torch.isfinite(score) | ~alive).all()):
                raise ValueError(f"{who}: {name} has scores that are not finite")
            informative = informative or bool(((score != 0) & alive).any())
    if not informative and begun:
        warn(f"{who}: pruning has cut the network off, every score is zero; the rest goes by position")
    elif not informative:
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


def batch_gradients(model: nn.Module, masks: Masks, batches: Batches, loss_fn: LossFn) -> Iterator[dict[str, Tensor]]:
    """The signed gradients of the masked weights, batch by batch, in evaluation mode; zero where there is none.

    The parameters' `.grad` is neither read nor written.
    """
    weights = {name: masks.weight(name) for name in masks}
    model = unwrap(model)  # DistributedDataParallel would wait for a backward pass of its own
    seen = False
    for inputs, targets in on_device(batches, model):
        with undisturbed(model), torch.enable_grad():
            loss = loss_fn(model(inputs), targets)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        seen = True
        yield {
            name: torch.zeros_like(weight) if gradient is None else gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
    if not seen:
        raise ValueError("no batches: the iterable is empty (a generator that was used up?)")


def summed_gradients(model: nn.Module, masks: Masks, batches: Batches, loss_fn: LossFn) -> dict[str, Tensor]:
    """The signed gradients of the masked weights, summed over all batches (and over ranks), in evaluation mode.

    The parameters' `.grad` is neither read nor written.
    """
    sums: dict[str, Tensor] = {}
    for gradients in batch_gradients(model, masks, batches, loss_fn):
        if not sums:
            sums = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
        for name, gradient in gradients.items():
            sums[name] += gradient
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


def run_batches(model: nn.Module, batches: Batches) -> None:
    """Runs tensors, or (inputs, …) tuples, through the model in evaluation mode, without gradients."""
    model = unwrap(model)
    device = next(model.parameters()).device
    seen = False
    with undisturbed(model), torch.no_grad():
        for batch in batches:
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            model(inputs.to(device) if isinstance(inputs, Tensor) else inputs)
            seen = True
    if not seen:
        raise ValueError("no batches: the iterable is empty (a generator that was used up?)")


def repeatable(batches: Batches) -> Batches:
    """The batches, as a list where they could be read only once."""
    return list(batches) if isinstance(batches, Iterator) else batches
