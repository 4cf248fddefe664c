"""Keeping dead weights dead during a ResNet-20 training step, against the alternatives.

python scripts/bench_masks.py [--rounds 15] [--device cuda] [--batch 64] [--json FILE]
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from benchmark import aim, arguments, by_name, compare, machine, parse, save
from torch import nn
from torch.nn.utils import prune

import recipes.models
from ap import Masks
from ap.slots import enforce


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    options = parse(parser)
    if options.quick:
        options.batch, options.repeats = 8, 1
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
        setting=f"ResNet-20, batch {options.batch}, 20 % of the weights alive, SGD with momentum: one training step",
        memory=True,
    )
    # Far below the noise of a whole step on a CPU: the hook is timed by itself, and held against that step.
    _, optimizer, masks = sparse()
    masks.bind(optimizer)
    for parameter in masks.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    slots = list(masks._slots.values())
    hook = compare(
        {"the hook of masks.bind": lambda: enforce(slots, optimizer)},
        "the hook of masks.bind",
        rounds=options.rounds,
        device=options.device,
        repeats=100,
        unit="us",
        setting="What masks.bind does after a step, by itself",
    )
    share = 1 + float(hook[0]["median_s"]) / float(by_name(rows, "no upkeep")["median_s"])
    what = "a ResNet-20's training step with `masks.bind`, of one without: by the hook alone"
    save(
        options.json,
        title="Keeping dead weights dead",
        about="What each way adds to a training step.",
        machine=machine(options.device),
        rows=rows + hook,
        aims=[aim("masks-step", what, share, 1.02)],
    )


if __name__ == "__main__":
    main()
