"""What compaction saves after pruning at initialisation: parameters, multiplications and measured latency.

    python scripts/bench_compaction.py [--rounds 11] [--device cuda] [--json FILE]

Networks for 32 × 32 images, pruned by SynFlow (20 rounds) or magnitude to 10 % and 1 % of their weights; latency is
that of a batch of 16 in evaluation mode. A trained network may keep more channels, or fewer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from benchmark import Row, arguments, compare, machine, parse, save
from torch import Tensor, nn

import ap
import pruners
from ap import Masks, compact
from recipes import models

NETWORKS = ("resnet20", "vgg16-bn", "mobilenetv2")


def main() -> None:
    options = parse(arguments(__doc__, rounds=11))
    warnings.simplefilter("ignore")  # layers that magnitude empties
    example = torch.zeros(16, 3, 32, 32, device=options.device)
    rows: list[Row] = []
    for name in NETWORKS[: 1 if options.quick else None]:
        for method in ("synflow", "magnitude"):
            for density in (0.1, 0.01):
                torch.manual_seed(0)
                model = models.create(name).to(options.device).eval()
                extra = {"example_input": example, "rounds": 20} if method == "synflow" else {}
                pruners.create(method, **extra).prune(model, Masks(model), amount=1 - density)
                small = compact(model, example)
                found = compare(
                    {"compacted": passing(small, example), "as pruned": passing(model, example)},
                    "as pruned",
                    rounds=options.rounds,
                    device=options.device,
                    setting=f"{name}, `{method}`, {density:.0%} of the weights",
                )
                sizes = ap.compare(model, small, example, rounds=1)
                for row, i in zip(found, (1, 0), strict=True):
                    row["extra"] = {"parameters": f"{sizes.parameters[i]:,}", "MACs": f"{sizes.macs[i]:,}"}
                rows += found
    save(
        options.json,
        title="Compaction",
        about="Latency of 16 images of 32 × 32, before and after `ap.compact`, of networks pruned at initialisation. "
        "Magnitude spreads what it keeps over the channels of a VGG or a ResNet, so that hardly any can go; SynFlow "
        "concentrates it on few. (In MobileNetV2 magnitude at 1 % empties whole layers: that network no longer works.)",
        machine=machine(options.device),
        rows=rows,
    )


def passing(model: nn.Module, example: Tensor) -> Callable[[], object]:
    """A forward pass."""

    def run() -> object:
        with torch.no_grad():
            return model(example)

    return run


if __name__ == "__main__":
    main()
