"""Masks, ranking, AP and dead-neuron rates on a large model on the CPU: peak memory and seconds of each.

    python scripts/check_scale.py [--weights 1e9] [--json FILE]

The model is a stack of linear layers with ReLU. The peak is the process's resident memory, which includes the model.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
from benchmark import machine, save
from torch import nn

import pruners
from ap import AP, Masks, measure_dnr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=float, default=1e9)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--json")
    options = parser.parse_args()
    width = round((options.weights / options.layers) ** 0.5)
    rows: list[dict[str, object]] = []

    def stage(name: str, function: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = function()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append({"stage": name, "seconds": time.perf_counter() - start, "peak_gib": peak})
        print(f"{name:42} {rows[-1]['seconds']:8.1f} s   peak so far {peak:6.2f} GiB", flush=True)
        return result

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(options.layers):
            layer = nn.Linear(width, width, bias=False)
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers)

    model = stage("model", build)
    assert isinstance(model, nn.Module)
    total = sum(p.numel() for p in model.parameters())
    print(f"{total:,} weights ({total * 4 / 2**30:.2f} GiB); {machine()}")
    masks = stage("masks", lambda: Masks(model))
    assert isinstance(masks, Masks)
    stage("magnitude, 20 %, global", lambda: pruners.create("magnitude").prune(model, masks, amount=0.2))
    stage("the same on pruned weights", lambda: pruners.create("magnitude").prune(model, masks, amount=0.2))
    stage("state, packed", lambda: masks.state_dict())
    plugin = AP(masks)
    stage("AP: mark_start (a copy of the weights)", plugin.mark_start)
    stage("AP: activate 2 %", plugin.activate)
    plugin.detach()
    stage("dead-neuron rates, 64 inputs", lambda: measure_dnr(model, [torch.randn(32, width) for _ in range(2)]))
    save(options.json, machine=machine(), weights=total, rows=rows)


if __name__ == "__main__":
    main()
