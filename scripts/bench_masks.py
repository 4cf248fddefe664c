"""Keeping dead weights dead during a ResNet-20 training step, against the alternatives.

python scripts/bench_masks.py [--rounds 15] [--device cuda] [--batch 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from benchmark import compare, machine, save
from torch import nn
from torch.nn.utils import prune

import recipes.models
from ap import Masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    original = recipes.models.create("resnet20").to(options.device)
    x = torch.randn(options.batch, 3, 32, 32, device=options.device)
    y = torch.randint(10, (options.batch,), device=options.device)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    def sparse() -> tuple[nn.Module, torch.optim.Optimizer, Masks]:
        model = copy.deepcopy(original)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        masks = Masks(model)
        masks.prune({name: masks.weight(name).detach().abs() for name in masks}, amount=0.8)
        return model, optimizer, masks

    def plain() -> Callable[[], None]:
        model, optimizer, _ = sparse()
        return lambda: step(model, optimizer)

    def bound() -> Callable[[], None]:
        model, optimizer, masks = sparse()
        masks.bind(optimizer)
        return lambda: step(model, optimizer)

    def torch_prune() -> Callable[[], None]:
        model, optimizer, masks = sparse()
        for name in masks:
            prune.custom_from_mask(masks.module(name), "weight", masks[name])
        return lambda: step(model, optimizer)

    def host_gradients() -> Callable[[], None]:
        """As published scripts do it: each gradient goes to the host, is masked there by NumPy, and comes back."""
        model, optimizer, masks = sparse()

        def masked() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            for name in masks:
                weight = masks.weight(name)
                kept = weight.detach().cpu().numpy() != 0
                weight.grad = torch.from_numpy(weight.grad.cpu().numpy() * kept).to(weight.device)
            optimizer.step()

        return masked

    print(f"ResNet-20, batch {options.batch}, 20 % of the weights alive, SGD; {machine(options.device)}\n")
    rows = compare(
        {
            "no upkeep": plain(),
            "masks.bind": bound(),
            "torch.nn.utils.prune": torch_prune(),
            "host-side gradient masking": host_gradients(),
        },
        "no upkeep",
        rounds=options.rounds,
        device=options.device,
        repeats=options.repeats,
    )
    save(options.json, machine=machine(options.device), batch=options.batch, rows=rows)


if __name__ == "__main__":
    main()
