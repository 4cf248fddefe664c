"""Which weights AP removes: the paper's criterion and its controls, one small function each.

A criterion gets one `Layer` and returns scores of the weight's shape: the lowest go first, and `inf` marks what may not
be chosen at all. All criteria remove the same number at the same point, so that "does AP help, and why?" has an answer.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ap.graph_trace import unwrap
from ap.names import unknown
from ap.ranks import reduce_over_ranks


@dataclass(frozen=True)
class Layer:
    """What a criterion may look at, for one weight.

    Attributes:
        name: the weight's name.
        weight: its values now, at the end of training.
        start: its values where this training started.
        decay: what weight decay alone would have left of a weight that got no gradient, as a factor.
        seed: for criteria that draw.
        statistics: of its inputs and the units it feeds, for criteria that need data.
    """

    name: str
    weight: Tensor
    start: Tensor
    decay: float = 1.0
    seed: int = 0
    statistics: LayerStatistics | None = None

    @property
    def movement(self) -> Tensor:
        """|w_end − w_start|."""
        return (self.weight - self.start).abs_()

    @property
    def random(self) -> Tensor:
        """Uniform draws that depend on the seed and the layer's name only."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"criterion:{self.seed}:{self.name}".encode()))
        return torch.rand(self.weight.shape, generator=generator).to(self.weight.device)


@dataclass(frozen=True)
class LayerStatistics:
    """Measured on data: E[x_j] and E[x_j²] of the inputs, [columns], and the dead rate of the fed channels, [rows]."""

    mean: Tensor
    square: Tensor
    dead: Tensor
    groups: int = 1


Criterion = Callable[[Layer], Tensor]
_CRITERIA: dict[str, Criterion] = {}


@dataclass
class BySign:
    """A criterion that may choose weights of one sign only, `inf` for all others.

    The ranking leaves the others out by itself instead, which is several times cheaper.

    Attributes:
        sign: −1, 1, or 0 for any.
        scores: of the weights of that sign; of the others whatever it likes.
        elementwise: a weight's score depends on that weight alone, so `scores` may be given pieces of a layer.
        measures: it needs `Layer.statistics`, and so batches. Any criterion may have this attribute.
    """

    sign: int
    scores: Criterion
    elementwise: bool = True
    measures: bool = False

    def __call__(self, layer: Layer) -> Tensor:
        scores = self.scores(layer)
        return torch.where(self.candidates(layer.weight), scores, torch.inf) if self.sign else scores

    def candidates(self, weight: Tensor) -> Tensor:
        """Which weights may be chosen, as bools."""
        weight = weight.detach()
        if not self.sign:
            return torch.ones_like(weight, dtype=torch.bool)
        if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):  # three times as fast
            compare = np.less if self.sign < 0 else np.greater
            return torch.from_numpy(np.asarray(compare(weight.numpy(), 0)))
        return weight < 0 if self.sign < 0 else weight > 0


def by_sign(sign: int, elementwise: bool = True, measures: bool = False) -> Callable[[Criterion], Criterion]:
    """Decorator: a function's scores, for weights of one sign; one that measures gets whole layers."""
    return lambda scores: functools.update_wrapper(BySign(sign, scores, elementwise and not measures, measures), scores)


def measures(criterion: str | Criterion) -> bool:
    """Whether a criterion, or the one of this name, needs batches.

    >>> measures("most-waking"), measures("least-moved-negative")
    (True, False)
    """
    return criterion != "pruner" and bool(getattr(get(criterion), "measures", False))


def register(name: str) -> Callable[[Criterion], Criterion]:
    """Makes a function `(Layer) -> scores` available under a name.

    Example:
        >>> @register("largest-positive")
        ... def largest_positive(layer):
        ...     return torch.where(layer.weight > 0, -layer.weight, torch.inf)
        >>> "largest-positive" in names()
        True
        >>> del _CRITERIA["largest-positive"]
    """

    def add(criterion: Criterion) -> Criterion:
        _CRITERIA[name] = criterion
        return criterion

    return add


def names() -> list[str]:
    """The registered criteria, and `pruner`, the pruner's own next choices, which the cycles provide."""
    return [*_CRITERIA, "pruner"]


def get(name: str | Criterion) -> Criterion:
    """The criterion of this name; a function is passed through.

    Raises:
        ValueError: an unknown name; the close ones are listed.
    """
    if callable(name):
        return name
    if name not in _CRITERIA:
        raise unknown("criterion", name, names())
    return _CRITERIA[name]


@register("least-moved-negative")
@by_sign(-1)
def least_moved_negative(layer: Layer) -> Tensor:
    """AP (Liu, Ghosh, Motani 2023): negative weights that training moved least.

    >>> least_moved_negative(Layer("w", torch.tensor([-1.0, 2.0, -3.0]), torch.tensor([-1.5, 0.0, -3.0])))
    tensor([0.5000,    inf, 0.0000])
    """
    return layer.movement


@register("decay-corrected")
@by_sign(-1)
def decay_corrected(layer: Layer) -> Tensor:
    """AP's criterion with the known effect of weight decay taken out of the movement (ours)."""
    return (layer.weight - layer.decay * layer.start).abs_()


@register("most-waking")
@by_sign(-1, measures=True)
def most_waking(layer: Layer) -> Tensor:
    """Most expected lift of dead units for the least disturbance of the output, measured on data (ours).

    Removes the negative weights with the largest (E[x_j] · d_i) / (|w_ij| · E[x_j²]), d_i the dead rate of the channel.
    """
    statistics = _measured(layer)
    ratio = torch.where(statistics.square > 0, statistics.mean / statistics.square, 0.0)
    lift = _spread(layer, ratio, statistics.dead)
    return -lift.to(layer.weight.dtype) / layer.weight.abs()


@register("gentle-waking")
@by_sign(-1, measures=True)
def gentle_waking(layer: Layer) -> Tensor:
    """The negative weights that change the output least, dead units first, measured on data (ours).

    Removes the negative weights with the smallest |w_ij| · √E[x_j²] / d_i: what Wanda prunes by (Sun et al. 2023), for
    weights that push down, divided by the dead rate of the channel they feed (no less than 0.001). Where the mean input
    is not positive, a negative weight does not push down: such weights come last.
    """
    statistics = _measured(layer)
    pushes = torch.where(statistics.mean > 0, statistics.square.sqrt(), torch.inf)
    norm = _spread(layer, pushes, 1 / statistics.dead.clamp(min=1e-3))
    return layer.weight.abs() * norm.to(layer.weight.dtype)


def _measured(layer: Layer) -> LayerStatistics:
    if layer.statistics is None:
        raise ValueError(f"{layer.name}: this criterion measures its inputs: give AP batches of (inputs, targets)")
    return layer.statistics


def _spread(layer: Layer, columns: Tensor, rows: Tensor) -> Tensor:
    """Products of a number a row and a number an input, in the weight's shape.

    A grouped convolution's rows see only their own group's inputs.
    """
    assert layer.statistics is not None
    groups, (height, width) = layer.statistics.groups, layer.weight.shape[:2]
    each = columns.view(groups, width).repeat_interleave(height // groups, dim=0)
    return (each * rows[:, None]).view(height, width, *(1,) * (layer.weight.dim() - 2))


@register("least-moved")
@by_sign(0)
def least_moved(layer: Layer) -> Tensor:
    """Control: moved least, of any sign."""
    return layer.movement


@register("least-moved-positive")
@by_sign(1)
def least_moved_positive(layer: Layer) -> Tensor:
    """Control: positive weights that moved least."""
    return layer.movement


@register("most-moved-negative")
@by_sign(-1)
def most_moved_negative(layer: Layer) -> Tensor:
    """Control: negative weights that moved most."""
    return layer.movement.neg_()


@register("smallest-negative")
@by_sign(-1)
def smallest_negative(layer: Layer) -> Tensor:
    """Control: the negative weights of least magnitude."""
    return layer.weight.abs()


@register("random-negative")
@by_sign(-1, elementwise=False)
def random_negative(layer: Layer) -> Tensor:
    """Control: negative weights drawn at random."""
    return layer.random


@register("random")
@by_sign(0, elementwise=False)
def random(layer: Layer) -> Tensor:
    """Control: weights of any sign drawn at random."""
    return layer.random


class DecayTracker:
    """What weight decay alone makes of a weight that gets no gradient, as a factor, step by step.

    Exact for SGD (with momentum, dampening, Nesterov), where the decay enters the gradient and so the momentum, and for
    decoupled decay (AdamW, NAdam and RAdam with `decoupled_weight_decay`). Where decay passes through an adaptive
    denominator (Adam, RMSprop with `weight_decay`) there is no such factor: that is refused.

    Example:
        >>> weight = nn.Parameter(torch.ones(1)); weight.grad = torch.zeros(1)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
        >>> tracker = DecayTracker()
        >>> for _ in range(5):
        ...     _ = optimizer.step(); tracker.step(optimizer)
        >>> abs(tracker.factor(weight) - weight.item()) < 1e-6
        True
    """

    def __init__(self) -> None:
        self._factors: dict[int, tuple[float, float | None]] = {}  # parameter: factor, momentum in units of w_start

    def factor(self, parameter: Tensor) -> float:
        """w_now / w_start of a weight of this parameter that got no gradient."""
        return self._factors.get(id(parameter), (1.0, None))[0]

    def set_factor(self, parameter: Tensor, factor: float, momentum: float | None) -> None:
        """Continues from a saved state."""
        self._factors[id(parameter)] = (factor, momentum)

    def state(self, parameter: Tensor) -> tuple[float, float | None]:
        """What `set_factor` takes."""
        return self._factors.get(id(parameter), (1.0, None))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """To be called after each step of the optimizer."""
        for group in optimizer.param_groups:
            decay, rate = float(group.get("weight_decay", 0.0)), float(group["lr"])
            if not decay:
                continue
            decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
            if not decoupled and not isinstance(optimizer, torch.optim.SGD):
                raise ValueError(
                    f"decay-corrected cannot tell weight decay from learning in {type(optimizer).__name__}, whose "
                    "decay passes through an adaptive denominator: use SGD or AdamW, or no weight decay"
                )
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                factor, momentum = self.state(parameter)
                if decoupled:
                    self._factors[id(parameter)] = (factor * (1 - rate * decay), None)
                    continue
                gradient = decay * factor
                if group["momentum"]:
                    fresh = momentum is None
                    momentum = gradient if fresh else group["momentum"] * momentum + (1 - group["dampening"]) * gradient
                    gradient = gradient + group["momentum"] * momentum if group["nesterov"] else momentum
                self._factors[id(parameter)] = (factor - rate * gradient, momentum)


@torch.no_grad()
def layer_statistics(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    activations: Mapping[str, str | None],
    batches: Iterable[object],
) -> dict[str, LayerStatistics]:
    """Measures what `most-waking` needs, in evaluation mode, over the batches of all ranks of torch.distributed.

    Args:
        model: the model to run.
        layers: convolutions and linear layers by name.
        activations: for each, the name of the activation that its output feeds (as in the DNR report), or None.
        batches: tensors or (inputs, targets) pairs.
    """
    from ap.dnr import measure_dnr

    model = unwrap(model)  # DistributedDataParallel would wait for the other ranks in each pass
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    hooks = []
    for name, module in layers.items():

        def add(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            x = inputs[0].detach()
            axes = [0, *range(2, x.dim())] if isinstance(module, nn.modules.conv._ConvNd) else list(range(x.dim() - 1))
            mean, square, count = sums.get(name, (0.0, 0.0, 0))
            count += math.prod(x.shape[axis] for axis in axes)
            sums[name] = (mean + x.sum(axes, dtype=torch.float32), square + x.float().square().sum(axes), count)

        hooks.append(module.register_forward_pre_hook(add))
    try:
        report = measure_dnr(model, batches)
    finally:
        for hook in hooks:
            hook.remove()
    statistics = {}
    for name, module in layers.items():
        if name not in sums:
            raise ValueError(f"{name} saw no input in the batches given")
        mean, square, count = sums[name]
        rows = int(module.get_parameter("weight").shape[0])
        activation = activations.get(name)
        layer = report.layers.get(activation) if activation else None
        dead = torch.zeros(rows)
        if layer is not None and layer.can_die:
            rates = layer.dead_rate_per_channel()
            if rates.numel() == rows:  # otherwise something between them mixes channels: no row can be told apart
                dead = rates
        total = torch.tensor(count, device=mean.device)
        reduce_over_ranks([total])
        dead = dead.to(mean) * (count / int(total))
        reduce_over_ranks([mean, square, dead])
        statistics[name] = LayerStatistics(
            mean / int(total), square / int(total), dead, int(getattr(module, "groups", 1))
        )
    return statistics
