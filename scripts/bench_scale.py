"""Masks, ranking, AP and dead-neuron rates of a model with a billion weights: seconds and memory of each stage, once.

    python scripts/bench_scale.py [--weights 1e9] [--device cuda] [--json FILE]

The model is a stack of linear layers with ReLU, so that single layers are large too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from benchmark import Row, arguments, machine, parse, peak_bytes, save
from torch import nn

import pruners
from ap import AP, Masks, measure_dnr


def main() -> None:
    parser = arguments(__doc__, rounds=1, quick_rounds=1)
    parser.add_argument("--weights", type=float)
    parser.add_argument("--layers", type=int, default=16)
    options = parse(parser)
    weights = options.weights or (1e6 if options.quick else 1e9)
    width = round((weights / options.layers) ** 0.5)
    setting = f"{options.layers} linear layers of {width:,} × {width:,} with ReLU, float32"
    rows: list[Row] = []

    def stage(name: str, function: Callable[[], Any]) -> Any:
        made: list[Any] = []
        taken: list[float] = []

        def run() -> None:
            start = time.perf_counter()
            made.append(function())
            if options.device.startswith("cuda"):
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)

        peak = peak_bytes(run, options.device)
        times = {"median_s": taken[0], "min_s": taken[0], "max_s": taken[0]}
        rows.append({"setting": setting, "name": name, "reference": None, "rounds": 1, "unit": "s", **times})
        rows[-1] |= {"ratio": None, "ratio_min": None, "ratio_max": None, "peak_bytes": peak}
        print(f"{name:45} {taken[0]:8.2f} s   {(peak or 0) / 2**20:10.0f} MiB", flush=True)
        return made[0]

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(options.layers):
            layers += [nn.Linear(width, width, bias=False, device=options.device), nn.ReLU()]
        return nn.Sequential(*layers)

    model = stage("the model itself", build)
    masks = stage("masks", lambda: Masks(model))
    magnitude = pruners.create("magnitude")
    stage("magnitude, 20 %, global", lambda: magnitude.prune(model, masks, amount=0.2))
    stage("the same on pruned weights", lambda: magnitude.prune(model, masks, amount=0.2))
    stage("state, packed bits", masks.state_dict)
    plugin = AP(masks)
    stage("AP: mark the start (a copy of the weights)", plugin.mark_start)
    stage("AP: remove 2 %", plugin.activate)
    plugin.detach()
    inputs = [torch.randn(32, width, device=options.device) for _ in range(2)]
    stage("dead-neuron rates, 64 inputs", lambda: measure_dnr(model, inputs))
    total = masks.total
    save(
        options.json,
        title="A billion weights",
        about=f"{total:,} weights, {total * 4 / 2**30:.2f} GiB, in this order; the memory is what a stage needs beside "
        "what the ones before it keep.",
        machine=machine(options.device),
        rows=rows,
    )


if __name__ == "__main__":
    main()
