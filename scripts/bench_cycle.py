"""What AP adds to one cycle of a pruning loop: marking the start, following what went to zero, choosing and removing.

    python scripts/bench_cycle.py [--rounds 7] [--device cuda] [--json FILE]

The training of the loop is a copy of trained-looking weights into the model, so that everything else can be seen.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
import torchvision.models
from benchmark import Row, arguments, bandwidth, bound, by_name, compare, machine, parse, save
from torch import nn

import pruners
import recipes.models
from ap import AP, Masks
from ap.cycles import Cycles
from ap.rewind import Snapshot

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": lambda: recipes.models.create("resnet20"),
    "ResNet-50": torchvision.models.resnet50,
}
# What AP's part of a cycle cannot avoid, in bytes a weight: copy the start (8); look for new zeros (4); rank by what
# training moved (weights, start and mask: 9); zero what goes (weights 8, mask 2).
TRAFFIC = 31


def main() -> None:
    options = parse(arguments(__doc__, rounds=7))
    warnings.simplefilter("ignore")  # layers that get empty
    rows: list[Row] = []
    bounds: list[Row] = []
    for name, create in list(MODELS.items())[: 1 if options.quick else None]:
        model = create().to(options.device)
        rows += cycle(model, name, options.device, options.rounds)
        rows += parts(model, name, options.device, options.rounds)
        weights = Masks(model).total
        adds = (
            by_name(rows, "with AP.cycle", _cycle(name))["median_s"] - by_name(rows, "no AP", _cycle(name))["median_s"]
        )
        what = f"{TRAFFIC} bytes a weight: start copied, zeros looked for, movement ranked, chosen weights zeroed"
        path = f"what AP adds to a cycle, {name}, {weights / 1e6:.2f} M weights"
        bounds.append(bound(path, what, TRAFFIC * weights, max(adds, 0.0), bandwidth(options.device)))
        rows += after_step(model, name, options.device, options.rounds)
    save(
        options.json,
        title="What AP adds to a cycle",
        about="A loop's cycle with everything but the training, which is a copy of other weights into the model: "
        "global magnitude pruning of 20 % and a rewind to the start. `Cycles` also checks that the weights are finite, "
        "keeps its history, and compares AP's choice with what the pruner would have taken.",
        machine=machine(options.device),
        rows=rows,
        bounds=bounds,
    )


def _cycle(name: str) -> str:
    return f"One cycle without its training, {name}"


def trained(model: nn.Module) -> Callable[[], None]:
    """Stands for a training: gives the weights the values that they might have after one."""
    after = [p.detach() + 0.1 * p.detach().std() * torch.randn_like(p) for p in model.parameters() if p.dim() > 1]

    @torch.no_grad()
    def train() -> None:
        for parameter, value in zip((p for p in model.parameters() if p.dim() > 1), after, strict=True):
            parameter.copy_(value)

    return train


def cycle(model: nn.Module, name: str, device: str, rounds: int) -> list[Row]:
    """A loop of one's own without and with AP, and `Cycles`, which trains twice for one pruning."""
    masks, start, train, magnitude = Masks(model), Snapshot(model), trained(model), pruners.create("magnitude")
    plugin = AP(masks)

    def fresh() -> None:
        plugin.detach()
        for mask in masks:
            masks[mask].fill_(True)
        start.restore(model)

    def bare(_: None) -> None:
        train()
        magnitude.prune(model, masks, amount=0.2)
        start.restore(model)
        masks.apply_()

    def with_ap(_: None) -> None:
        with plugin.cycle(amount=0.2) as share:
            train()
            masks.apply_()  # as the optimizer's steps would have
            magnitude.prune(model, masks, amount=share)
        start.restore(model)
        masks.apply_()

    def loop(variant: str) -> Callable[[None], None]:
        def run(_: None) -> None:
            def training(model: nn.Module, masks: Masks, of: object) -> dict[str, float]:
                train()
                masks.apply_()
                return {}

            Cycles(model, magnitude, cycles=1, ap=variant, masks=masks).run(training)

        return run

    own: dict[str, Callable[[None], None]] = {"no AP": bare, "with AP.cycle": with_ap}
    loops = {"Cycles, none": loop("none"), "Cycles, lite": loop("lite")}
    setting = f"Cycles from the start to the second training, {name}"
    found = compare(own, "no AP", rounds, device, setting=_cycle(name), memory=True, fresh=fresh)
    found += compare(loops, "Cycles, none", rounds, device, setting=setting, memory=True, fresh=fresh)
    fresh()
    return found


def parts(model: nn.Module, name: str, device: str, rounds: int) -> list[Row]:
    """The stages of AP's part, and the choice by each criterion that needs no data."""
    masks, train = Masks(model), trained(model)
    plugin = AP(masks)
    plugin.mark_start()
    train()
    stages: dict[str, Callable[[], object]] = {
        "choose: least-moved-negative": plugin.preview,
        "choose: decay-corrected": lambda: plugin.preview(criterion="decay-corrected"),
        "choose: smallest-negative": lambda: plugin.preview(criterion="smallest-negative"),
        "choose: random-negative": lambda: plugin.preview(criterion="random-negative"),
        "absorb": plugin.absorb,
        "mark_start": plugin.mark_start,
    }
    found = compare(stages, "choose: least-moved-negative", rounds, device, setting=f"Stages, {name}", memory=True)
    plugin.detach()
    return found


def after_step(original: nn.Module, name: str, device: str, rounds: int) -> list[Row]:
    """An optimizer's step alone, and what AP adds to it."""
    plugins = []  # so that none lets go of its model before the end

    def step(share: float | None) -> Callable[[], object]:
        model = copy.deepcopy(original)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        if share is not None:
            plugin = AP(model)
            if share:
                pruners.create("magnitude").prune(model, plugin.masks, amount=share)
            plugin.mark_start()
            plugins.append(plugin)
        return optimizer.step

    candidates = {"no AP": step(None), "AP, every weight alive": step(0.0), "AP, 20 % of them dead": step(0.2)}
    setting = f"One optimizer step alone (SGD with momentum), {name}"
    found = compare(candidates, "no AP", rounds, device, setting=setting, repeats=5, warmup=2)
    for plugin in plugins:
        plugin.detach()
    return found


if __name__ == "__main__":
    main()
