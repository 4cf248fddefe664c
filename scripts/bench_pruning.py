"""One global pruning of 20 % of a model's weights by magnitude, at four sizes, against the alternatives.

python scripts/bench_pruning.py [--rounds 5] [--device cuda] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torchvision.models
from benchmark import Row, aim, arguments, bandwidth, bound, by_name, compare, machine, parse, peak_bytes, save
from torch import Tensor, nn
from torch.nn.utils import prune

import pruners
import recipes.models
from ap import Masks
from ap.ranking import lowest

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": lambda: recipes.models.create("resnet20"),
    "ResNet-50": torchvision.models.resnet50,
    "ViT-B/16": torchvision.models.vit_b_16,
    "ViT-L/16": torchvision.models.vit_l_16,
}
# What pruning by magnitude cannot avoid, in bytes a weight: to rank, read the weights (4) and the mask (1); to zero,
# read and write the weights (8) and the mask (2).
TRAFFIC = 15


def main() -> None:
    options = parse(arguments(__doc__, rounds=7))
    rows: list[Row] = []
    bounds: list[Row] = []
    for name, create in list(MODELS.items())[: 2 if options.quick else None]:
        model = create().to(options.device)
        masks = Masks(model)
        label = f"{name}, {masks.total / 1e6:.2f} M weights"
        rounds = min(options.rounds, 2 if masks.total > 2e8 else 3 if masks.total > 5e7 else options.rounds)
        rows += measure(model, masks, label, options.device, rounds)
        taken = float(by_name(rows, "pruners: magnitude", label)["median_s"])
        speed = bandwidth(options.device)
        what = f"{TRAFFIC} bytes a weight: weights and masks read to rank, read and written to zero"
        bounds.append(bound(f"global pruning, {label}", what, TRAFFIC * masks.total, taken, speed))
        del model, masks
    resnet50 = f"{rows[4]['setting']}"
    mine = by_name(rows, "pruners: magnitude", resnet50)
    numpy = by_name(rows, "NumPy percentile", resnet50)
    sizes = (1_000_000, 5_000_000) if options.quick else (25_000_000, 300_000_000)
    extra = max(extra_mib(size, options.device) for size in sizes)
    aims = [
        aim("prune-torch", "time of a global pruning of a ResNet-50, of torch.nn.utils.prune's", mine["ratio"], 1 / 12),
        aim("prune-numpy", "the same, of one NumPy percentile's", mine["ratio"] / numpy["ratio"], 1),
        aim(
            "prune-memory",
            f"ranking's memory beside scores and result, {sizes[1] / 1e6:.0f} M weights",
            extra,
            64,
            "MiB",
        ),
    ]
    save(
        options.json,
        title="Global pruning of 20 % by magnitude",
        about="Ranking and zeroing, masks included; the model is restored between the calls, outside of the time.",
        machine=machine(options.device),
        rows=rows,
        aims=aims,
        bounds=bounds,
    )


def measure(model: nn.Module, masks: Masks, label: str, device: str, rounds: int) -> list[Row]:
    """Ours against three alternatives, on one model that is restored before each call."""
    owners = [(masks.module(name), name.rpartition(".")[2]) for name in masks]
    weights = [masks.weight(name) for name in masks]
    before = [weight.detach().clone() for weight in weights]
    magnitude = pruners.create("magnitude")

    @torch.no_grad()
    def restore() -> None:
        for (module, attribute), name, value in zip(owners, masks, before, strict=True):
            if prune.is_pruned(module) and f"{attribute}_mask" in module._buffers:
                prune.remove(module, attribute)
            masks.weight(name).copy_(value)
            masks[name].fill_(True)

    def ours(_: None) -> None:
        magnitude.prune(model, masks, amount=0.2)

    def torch_prune(_: None) -> None:
        prune.global_unstructured(owners, prune.L1Unstructured, amount=0.2)

    @torch.no_grad()
    def zero_up_to(threshold: float) -> None:
        for weight in weights:
            weight.mul_(weight.abs() > threshold)

    def numpy_percentile(_: None) -> None:
        values = np.concatenate([weight.detach().abs().cpu().numpy().ravel() for weight in weights])
        zero_up_to(float(np.percentile(values, 20)))

    def kthvalue(_: None) -> None:
        values = torch.cat([weight.detach().abs().view(-1) for weight in weights])
        zero_up_to(float(torch.kthvalue(values, round(0.2 * len(values))).values))

    candidates: dict[str, Callable[[None], None]] = {
        "pruners: magnitude": ours,
        "NumPy percentile": numpy_percentile,
        "torch.kthvalue": kthvalue,
        "torch.nn.utils.prune": torch_prune,
    }
    return compare(
        candidates, "torch.nn.utils.prune", rounds, device, setting=label, memory=True, fresh=restore, warmup=1
    )


def extra_mib(size: int, device: str) -> float:
    """Peak growth of the memory during a selection, less what it returns, which is a byte a weight."""
    pieces = 8
    scores = {str(i): torch.randn(size // pieces, device=device) for i in range(pieces)}
    eligible = {name: torch.rand(len(score), device=device) < 0.9 for name, score in scores.items()}
    result: dict[str, Tensor] = {}
    peak = peak_bytes(lambda: result.update(lowest(scores, eligible, size // 5)), device)
    if peak is None:
        return float("nan")
    return max(0, peak - sum(chosen.numel() for chosen in result.values())) / 2**20


if __name__ == "__main__":
    main()
