"""One global pruning of 20 % of a ResNet-50-sized model, against the alternatives, one CPU thread.

    python scripts/bench_pruning.py [--rounds 7] [--device cuda] [--json FILE]

Also measured: the memory that the ranking needs beside the scores, at two sizes.
"""

from __future__ import annotations

import argparse
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from benchmark import compare, machine, save
from torch import nn
from torch.nn.utils import prune
from torchvision.models import resnet50

from ap import Masks
from ap.ranking import LazyScores, lowest


def weights_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = resnet50().to(options.device)
    layers = weights_of(model)
    total = sum(layer.weight.numel() for layer in layers)
    print(f"{total:,} weights; {machine(options.device)}\n")
    fresh = [layer.weight.detach().clone() for layer in layers]

    def reset() -> None:
        with torch.no_grad():
            for layer, weight in zip(layers, fresh, strict=True):
                layer.weight.copy_(weight)

    masks = Masks(model)

    def ours() -> None:
        for name in masks:
            masks[name].fill_(True)
        masks.prune(LazyScores(masks.names, lambda name: masks.weight(name).detach().abs()), amount=0.2)
        reset()

    def torch_prune() -> None:
        prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.2)
        for layer in layers:
            prune.remove(layer, "weight")
        reset()

    def by_threshold(threshold: float) -> None:
        with torch.no_grad():
            for layer in layers:
                layer.weight.mul_(layer.weight.abs() > threshold)
        reset()

    def numpy_percentile() -> None:
        values = np.concatenate([layer.weight.detach().abs().cpu().numpy().ravel() for layer in layers])
        by_threshold(float(np.percentile(values, 20)))

    def kthvalue() -> None:
        values = torch.cat([layer.weight.detach().abs().view(-1) for layer in layers])
        by_threshold(float(torch.kthvalue(values, round(0.2 * total)).values))

    candidates = {
        "ap.Masks.prune": ours,
        "NumPy percentile": numpy_percentile,
        "torch.kthvalue": kthvalue,
        "torch.nn.utils.prune": torch_prune,
    }
    rows = compare(candidates, "torch.nn.utils.prune", rounds=options.rounds, device=options.device)
    memory = []
    if options.device == "cpu":
        print("\nmemory beside the scores and the result, by the resident memory of the process (MiB)")
        for size in (25_000_000, 200_000_000):
            memory.append({"weights": size, "extra_mib": extra_memory(size)})
            print(f"{size:12,} weights: {memory[-1]['extra_mib']:.1f}")
    save(options.json, machine=machine(options.device), weights=total, rows=rows, memory=memory)


def extra_memory(size: int) -> float:
    """Peak growth of the resident memory during a selection, less what it returns, which is a byte a weight."""
    pieces = 8
    scores = {str(i): torch.randn(size // pieces) for i in range(pieces)}
    eligible = {name: torch.rand(len(score)) < 0.9 for name, score in scores.items()}
    result: dict[str, torch.Tensor] = {}
    with ThreadPoolExecutor(1) as pool:
        before = resident()
        job = pool.submit(lowest, scores, eligible, size // 5)
        peak = before
        while not job.done():
            peak = max(peak, resident())
            time.sleep(0.001)
        result = job.result()
    return max(0, peak - before - sum(chosen.numel() for chosen in result.values())) / 2**20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
