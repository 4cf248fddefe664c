"""Many small trainings as one: models of one architecture with their parameters stacked, one vmapped step for all."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs [T, B, ...], labels [T, B]) to one loss a trial, [T]."""


class Stack:
    """T models of one architecture, whose parameters become tensors [T, ...].

    The trials never mix: the sum of their losses has each trial's own gradient in its own slice, and an elementwise
    optimizer trains each as if it were alone.

    >>> stack = Stack([nn.Linear(3, 2) for _ in range(5)])
    >>> stack(torch.zeros(7, 3), shared=True).shape
    torch.Size([5, 7, 2])
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        if not models:
            raise ValueError("a stack needs at least one model")
        self.models = list(models)
        params, buffers = torch.func.stack_module_state(self.models)
        self.params: dict[str, Tensor] = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
        self.buffers: dict[str, Tensor] = {n: b.detach().clone() for n, b in buffers.items()}
        self._template = copy.deepcopy(self.models[0])

    def __len__(self) -> int:
        return len(self.models)

    def train(self, mode: bool = True) -> Stack:
        """Training or evaluation mode of all."""
        self._template.train(mode)
        return self

    def __call__(self, x: Tensor, shared: bool = False) -> Tensor:
        """Outputs [T, B, ...] for inputs [T, B, ...], or [B, ...] where all trials share them."""

        def one(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(self._template, (params, buffers), (x,))

        if any(isinstance(module, nn.RReLU) for module in self._template.modules()):
            # The one activation that torch cannot batch: its models run one after the other.
            one_by_one = [
                one(_slice(self.params, t), _slice(self.buffers, t), x if shared else x[t]) for t in range(len(self))
            ]
            return torch.stack(one_by_one)
        call = torch.vmap(one, in_dims=(0, 0, None if shared else 0), randomness="different")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # one pooling layer has no batching rule
            return call(self.params, self.buffers, x)

    @torch.no_grad()
    def write_back(self) -> list[nn.Module]:
        """Copies every trial's parameters and buffers into its own model, and returns the models."""
        for t, model in enumerate(self.models):
            for name, parameter in model.named_parameters():
                parameter.copy_(self.params[name][t])
            for name, buffer in model.named_buffers():
                buffer.copy_(self.buffers[name][t])
        return self.models

    def masks(self, masks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """One mapping name → bool tensor a model, stacked as factors."""
        names = list(masks[0])
        return {n: torch.stack([m[n] for m in masks]).to(self.params[n].dtype) for n in names}


def _slice(values: Mapping[str, Tensor], t: int) -> dict[str, Tensor]:
    return {name: value[t] for name, value in values.items()}


class Optimizer:
    """An elementwise optimizer over stacked parameters [T, ...], with a learning rate for each trial.

    Parameters that hold one number or one vector a model (biases, norms, slopes of activations) get no weight decay.
    With `clip`, the gradient of each trial has at most that norm.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        lr: float | Tensor,
        weight_decay: float = 0.0,
        clip: float | None = None,
    ) -> None:
        self.params = list(params.values())
        self.clip = clip
        trials = self.params[0].shape[0]
        rates = torch.as_tensor(lr, dtype=torch.float64).expand(trials)
        self._rates = [rates.to(p).view(-1, *(1,) * (p.dim() - 1)) for p in self.params]
        self._decay = [weight_decay if p.dim() > 2 else 0.0 for p in self.params]

    @torch.no_grad()
    def step(self, loss: Tensor, scale: float = 1.0) -> None:
        """One step down the gradient of `loss` (a sum over trials), with `scale` times the learning rate."""
        gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, self.params, allow_unused=True)
        if self.clip is not None:
            gradients = self._clipped([g for g in gradients if g is not None], gradients)
        for i, (p, g) in enumerate(zip(self.params, gradients, strict=True)):
            if g is None:
                continue
            if self._decay[i]:
                g = g.add(p, alpha=self._decay[i])
            p.sub_(self._direction(i, g).mul_(self._rates[i] * scale))

    def _clipped(self, present: list[Tensor], gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Every trial's gradient, of norm `clip` at most."""
        assert self.clip is not None
        norm = torch.stack([g.flatten(1).square().sum(1) for g in present]).sum(0).sqrt()  # [T]
        factor = (self.clip / norm.clamp(min=1e-12)).clamp(max=1)
        return tuple(None if g is None else g * factor.view(-1, *(1,) * (g.dim() - 1)) for g in gradients)

    def _direction(self, i: int, gradient: Tensor) -> Tensor:
        raise TypeError("use SGD or Adam")


class SGD(Optimizer):
    """Gradient descent with momentum."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        lr: float | Tensor,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        clip: float | None = None,
    ) -> None:
        super().__init__(params, lr, weight_decay, clip)
        self.momentum = momentum
        self._velocity = [torch.zeros_like(p) for p in self.params] if momentum else []

    def _direction(self, i: int, gradient: Tensor) -> Tensor:
        if not self.momentum:
            return gradient.clone()
        return self._velocity[i].mul_(self.momentum).add_(gradient).clone()


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015) with its usual constants."""

    def __init__(self, params: Mapping[str, Tensor], lr: float | Tensor, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)
        self._first = [torch.zeros_like(p) for p in self.params]
        self._second = [torch.zeros_like(p) for p in self.params]
        self._steps = [0] * len(self.params)

    def _direction(self, i: int, gradient: Tensor) -> Tensor:
        self._steps[i] += 1
        first = self._first[i].lerp_(gradient, 0.1)
        second = self._second[i].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        root = second.div(1 - 0.999 ** self._steps[i]).sqrt_().add_(1e-8)
        return first.div(1 - 0.9 ** self._steps[i]).div_(root)


def orders(count: int, seeds: Sequence[int], batch: int) -> Iterator[Tensor]:
    """Endless indices [T, batch]: every trial goes through `count` samples epoch by epoch in its own seed's order."""
    batch = min(batch, count)
    generators = {seed: torch.Generator().manual_seed(seed) for seed in seeds}
    while True:
        epoch = {seed: torch.randperm(count, generator=g) for seed, g in generators.items()}
        stacked = torch.stack([epoch[seed] for seed in seeds])
        for start in range(0, count - batch + 1, batch):
            yield stacked[:, start : start + batch]


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross entropy, one mean a trial: [T, B, K] and [T, B] to [T]."""
    losses = F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape).mean(1)


def fit(
    stack: Stack,
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
    seeds: Sequence[int],
    *,
    steps: int,
    batch: int,
    loss: Loss = cross_entropy,
    masks: Mapping[str, Tensor] | None = None,
    schedule: Callable[[float], float] = lambda done: 1.0,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Trains all trials for `steps` steps, each on batches in its seed's order, and returns their last losses [T].

    `masks` keep dead weights at zero; `schedule` maps the share of steps done, in [0, 1), to a factor of the learning
    rate; `on_step(n)` is called with the number of steps made, 0 before the first.
    """
    stack.train()
    if masks:
        _apply(stack, masks)
    last = torch.full((len(stack),), torch.nan)
    source = orders(len(labels), seeds, batch)
    for step in range(steps):
        if on_step is not None:
            on_step(step)
        index = next(source)
        each = loss(stack(images[index]), labels[index])
        optimizer.step(each.sum(), schedule(step / steps))
        if masks:
            _apply(stack, masks)
        last = each.detach()
    if on_step is not None:
        on_step(steps)
    return last


@torch.no_grad()
def _apply(stack: Stack, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        stack.params[name].mul_(mask)


@torch.no_grad()
def outputs(stack: Stack, images: Tensor, batch: int = 512) -> Tensor:
    """All outputs [T, N, ...] in evaluation mode."""
    stack.train(False)
    return torch.cat([stack(chunk, shared=True) for chunk in images.split(batch)], dim=1)


def accuracy(stack: Stack, images: Tensor, labels: Tensor) -> list[float]:
    """The share of right answers of every trial, in percent; a network that is no longer finite has none right."""
    predicted = outputs(stack, images)
    right = (predicted.argmax(-1) == labels) & torch.isfinite(predicted).all(-1)
    return (100 * right.double().mean(1)).tolist()


def warmup_cosine(share: float = 0.1) -> Callable[[float], float]:
    """A linear rise over the first `share` of the steps, then half a cosine down to zero."""

    def factor(done: float) -> float:
        if done < share:
            return (done + 1e-3) / (share + 1e-3)
        return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (done - share) / (1 - share)))))

    return factor
