"""Iterative pruning of many models side by side: all arms and seeds of one architecture train as one stack."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import pruners
from ap.dnr import measure_dnr
from ap.masks import Masks
from ap.plugin import AP, split
from recipes.studies.images import Images
from recipes.studies.stacked import SGD, Stack, accuracy, fit, warmup_cosine

PROBE = 500  # test images on which dead neurons are counted


@dataclass(frozen=True)
class Arm:
    """A way to prune: by the pruner alone (criterion None), or with AP's step and this criterion."""

    name: str
    criterion: str | None = None


@dataclass(frozen=True)
class Plan:
    """How the models of a study train and are pruned: magnitude pruning with rewinding to the start."""

    steps: int
    batch: int = 64
    rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    cycles: int = 0
    amount: float = 0.36
    share: float = 0.04  # AP's part of what is alive, within `amount`
    clip: float | None = None  # the largest norm of a gradient


def train(models: Sequence[nn.Module], seeds: Sequence[int], data: Images, plan: Plan, **kwargs: Any) -> Stack:
    """Trains copies of `models` as one stack (batches by each one's seed) and returns it; `models` get the weights."""
    stack = Stack(models)
    optimizer = SGD(stack.params, plan.rate, plan.momentum, plan.weight_decay, plan.clip)
    schedule = warmup_cosine()
    fit(stack, optimizer, *data.train, seeds, steps=plan.steps, batch=plan.batch, schedule=schedule, **kwargs)
    stack.write_back()
    return stack


def dead(model: nn.Module, data: Images) -> dict[str, Any]:
    """The model's rates on the probe, and its layers'; None where nothing can die."""
    try:
        report = measure_dnr(model, [data.test[0][:PROBE]])
    except ValueError:  # no activation of this model can die
        return {"total": None, "static": None, "dynamic": None, "layers": {}}
    layers = {
        n: {"total": r.total, "static": r.static, "gradient_static": r.gradient_static}
        for n, r in report.layers.items()
        if r.can_die
    }
    return {"total": report.total, "static": report.static, "dynamic": report.dynamic, "layers": layers}


def prune(
    build: Callable[[int], nn.Module],
    arms: Sequence[Arm],
    seeds: Sequence[int],
    data: Images,
    plan: Plan,
    look: Callable[[nn.Module, Images], dict[str, Any]] = dead,
) -> list[dict[str, Any]]:
    """One row for each trained network: arm, seed, cycle, density, accuracy and what `look` sees in it.

    All arms remove the same number of weights at each cycle. The dense networks are the same in all arms and train once
    for each seed. A network whose weights are no longer finite has an accuracy of 0 and is pruned by its initial ones.
    """
    starts = [build(seed) for seed in seeds]
    trained = [copy.deepcopy(model) for model in starts]
    stack = train(trained, seeds, data, plan)
    rows = [
        {"arm": arm.name, "seed": seed, "cycle": 0, "density": 1.0, "accuracy": score, **look(model, data)}
        for seed, model, score in zip(seeds, trained, accuracy(stack, *data.test), strict=True)
        for arm in arms
    ]
    runs = [
        (arm, seed, start, copy.deepcopy(end))
        for arm in arms
        for seed, start, end in zip(seeds, starts, trained, strict=True)
    ]
    masks = [Masks(model) for *_, model in runs]
    pruner = pruners.create("magnitude")
    for cycle in range(1, plan.cycles + 1):
        for (arm, seed, start, model), alive in zip(runs, masks, strict=True):
            total, own = split(alive.alive, plan.amount, plan.share)
            before = alive.alive
            with torch.no_grad():
                finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
                end = copy.deepcopy((model if finite else start).state_dict())
                model.load_state_dict(start.state_dict())
            if arm.criterion is None:
                own = 0
            plugin = None
            if own:
                batches = [(data.train[0][:PROBE], data.train[1][:PROBE])]
                plugin = AP(alive, plan.share, arm.criterion or "", batches=batches, seed=seed)
                plugin.mark_start()
            model.load_state_dict(end)
            alive.apply_()
            pruner.prune(model, alive, amount=(total - own) / before)
            if plugin is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a shortfall is in the density of the row
                    plugin.activate(count=own)
                plugin.detach()
            model.load_state_dict(start.state_dict())
            alive.apply_()
        members = [model for *_, model in runs]
        names = [seed for _, seed, *_ in runs]
        factors = Stack(members).masks([{n: m[n] for n in m.names} for m in masks])
        stack = train(members, names, data, plan, masks=factors)
        scores = accuracy(stack, *data.test)
        rows += [
            {
                "arm": arm.name,
                "seed": seed,
                "cycle": cycle,
                "density": m.density,
                "accuracy": score,
                **look(model, data),
            }
            for (arm, seed, _, model), m, score in zip(runs, masks, scores, strict=True)
        ]
    return rows


def values(rows: Sequence[dict[str, Any]], key: str, **where: Any) -> list[float]:
    """`key` of the rows that match, in the order of their seeds."""
    chosen = [row for row in rows if all(row[k] == v for k, v in where.items())]
    return [row[key] for row in sorted(chosen, key=lambda row: row["seed"])]
