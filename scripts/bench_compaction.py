"""What compaction saves after pruning at initialisation: parameters, MACs and measured latency.

    python scripts/bench_compaction.py --threads 1

Networks for 32 × 32 images, pruned by SynFlow (20 rounds) or magnitude to 10 % and 1 % of their weights; latency is the
median of interleaved passes of a batch of 16 before and after. A trained network may keep more channels, or fewer.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from bench_pruners import processor

import pruners
from ap.compaction import compact, compare
from ap.masks import Masks
from recipes import models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # layers that magnitude empties
    torch.set_num_threads(options.threads)
    print(f"{processor()}, {options.threads} thread(s), torch {torch.__version__}, {options.rounds} rounds\n")
    print("| network | pruner | density | parameters | MACs | latency, ms |\n| --- | --- | --- | --- | --- | --- |")
    example = torch.zeros(16, 3, 32, 32)
    for name in ("resnet20", "vgg16-bn", "mobilenetv2"):
        for method in ("synflow", "magnitude"):
            for density in (0.1, 0.01):
                torch.manual_seed(0)
                model = models.create(name)
                extra = {"example_input": example, "rounds": 20} if method == "synflow" else {}
                pruners.create(method, **extra).prune(model, Masks(model), amount=1 - density)
                result = compare(model, compact(model, example), example, rounds=options.rounds)
                before, after = (1e3 * seconds for seconds in result.latency_s)
                print(
                    f"| {name} | `{method}` | {density:.0%} | {_ratio(*result.parameters)} | {_ratio(*result.macs)} | "
                    f"{before:.1f} → {after:.1f} ({after / before:.2f}) |",
                    flush=True,
                )


def _ratio(before: int, after: int) -> str:
    return f"{before:,} → {after:,} ({after / before:.3f})"


if __name__ == "__main__":
    main()
