"""Child networks of the activation search: one small network for each candidate, all trained as one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.studies.grammar import Candidate, Grouped
from recipes.studies.stacked import Adam, cross_entropy, orders


@dataclass(frozen=True)
class Child:
    """Fully connected, each hidden layer normalised (without learnable numbers) before its activation."""

    hidden: tuple[int, ...] = (32, 32)
    steps: int = 150
    batch: int = 64
    rate: float = 0.01


def train(
    candidates: Sequence[Candidate],
    seeds: Sequence[int],
    child: Child,
    data: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    classes: int,
) -> list[float | None]:
    """The accuracy in percent on `held_out` of one network for each candidate, None where it is no longer finite.

    Inputs are [N, features], and the networks train on their device. Networks of the same seed start from the same
    weights and see the same batches, so that the activation is all that differs. The learning rate falls linearly to 0.
    """
    x, y = data
    widths = [x.shape[1], *child.hidden, classes]
    params: dict[str, Tensor] = {}
    drawn = {seed: _weights(widths, seed) for seed in seeds}
    for layer in range(len(widths) - 1):
        params[f"w{layer}"] = torch.stack([drawn[seed][layer] for seed in seeds])
        params[f"c{layer}"] = torch.zeros(len(seeds), 1, widths[layer + 1])
    group = Grouped(candidates)
    for layer in range(len(child.hidden)):
        params[f"b{layer}"] = torch.ones(len(seeds), 3 * group.units)
    params = {name: parameter.to(x.device).requires_grad_() for name, parameter in params.items()}

    def forward(inputs: Tensor) -> Tensor:
        h = inputs  # [T, B, features]
        for layer in range(len(child.hidden)):
            h = torch.baddbmm(params[f"c{layer}"], h, params[f"w{layer}"])
            h = group(F.layer_norm(h, h.shape[-1:]), params[f"b{layer}"])
        last = len(child.hidden)
        return torch.baddbmm(params[f"c{last}"], h, params[f"w{last}"])

    optimizer = Adam(params, child.rate)
    source = orders(len(y), seeds, child.batch)
    for step in range(child.steps):
        index = next(source).to(x.device)
        optimizer.step(cross_entropy(forward(x[index]), y[index]).sum(), 1 - step / child.steps)
    with torch.no_grad():
        scores = forward(held_out[0].expand(len(seeds), -1, -1))
        right = 100 * (scores.argmax(-1) == held_out[1]).double().mean(1)
        finite = torch.isfinite(scores).all(-1).all(-1)
    return [float(r) if ok else None for r, ok in zip(right, finite, strict=True)]


def _weights(widths: Sequence[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(fan_in, fan_out, generator=generator) / fan_in**0.5
        for fan_in, fan_out in itertools.pairwise(widths)
    ]
