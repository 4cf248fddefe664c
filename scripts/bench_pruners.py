"""What one call of each pruner costs on a ResNet-50, against the fastest public way to do the same.

    python scripts/bench_pruners.py [--rounds 3] [--device cuda] [--only lamp …]

Both sides prune 20 % (nm: half) of a fresh copy of torchvision's ResNet-50, in alternating rounds; data-driven ones see
one batch of four 64 × 64 images. The public side is torch.nn.utils.prune or torch-pruning, fed with the same scores
computed in the plainest way where the library has none.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from benchmark import Row, arguments, compare, machine, parse, save
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torchvision.models import resnet50

import pruners
import recipes.models
from ap.masks import Masks

AMOUNT = 0.2
Data = list[tuple[Tensor, Tensor]]
Run = Callable[[nn.Module], None]


def layers(model: nn.Module) -> list[nn.Module]:
    """Convolutions and linear layers."""
    return [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def globally(model: nn.Module, scores: dict[nn.Module, Tensor] | None = None, method: Any = None) -> None:
    """torch.nn.utils.prune.global_unstructured, by importance scores if given."""
    pairs = [(module, "weight") for module in layers(model)]
    given = None if scores is None else {(module, "weight"): score for module, score in scores.items()}
    torch_prune.global_unstructured(pairs, method or torch_prune.L1Unstructured, importance_scores=given, amount=AMOUNT)


def lamp(model: nn.Module) -> None:
    """Sorted squares over their sums from there on, layer by layer."""
    scores = {}
    for module in layers(model):
        square = module.weight.detach().square().flatten()
        ordered, order = square.sort(descending=True)
        scores[module] = torch.empty_like(square).scatter_(0, order, ordered / ordered.cumsum(0))
        scores[module] = scores[module].view_as(module.weight)
    globally(model, scores)


def by_gradient(score: Callable[[Tensor, Tensor], Tensor], data: Data) -> Run:
    """A backward pass, then global_unstructured."""

    def run(model: nn.Module) -> None:
        model.eval()
        for inputs, targets in data:
            F.cross_entropy(model(inputs), targets).backward()
        globally(model, {m: score(m.weight.detach(), m.weight.grad) for m in layers(model)})

    return run


def grasp(data: Data) -> Run:
    """Two backward passes, the second through the first."""

    def run(model: nn.Module) -> None:
        model.eval()
        modules = layers(model)
        weights = [module.weight for module in modules]
        (inputs, targets) = data[0]
        fixed = torch.autograd.grad(F.cross_entropy(model(inputs) / 200, targets), weights)
        again = torch.autograd.grad(F.cross_entropy(model(inputs) / 200, targets), weights, create_graph=True)
        sum((a * b).sum() for a, b in zip(again, fixed, strict=True)).backward()
        globally(model, {m: m.weight.detach() * m.weight.grad for m in modules})

    return run


def synflow(data: Data) -> Run:
    """One round in float64, as ours."""

    def run(model: nn.Module) -> None:
        twin = copy.deepcopy(model).double().eval()
        with torch.no_grad():
            for value in twin.state_dict().values():
                value.abs_()
        twin(torch.ones_like(data[0][0][:1], dtype=torch.float64)).sum().backward()
        scores = [(m.weight.detach() * m.weight.grad).abs() for m in layers(twin)]
        globally(model, dict(zip(layers(model), scores, strict=True)))

    return run


def wanda(data: Data) -> Run:
    """Unfolded inputs, then a sort of every row, as published for linear layers."""

    def run(model: nn.Module) -> None:
        squares: dict[nn.Module, Tensor] = {}

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if isinstance(module, nn.Conv2d):
                x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
            squares[module] = x.square().flatten(0, -2).sum(0)

        handles = [module.register_forward_pre_hook(hook) for module in layers(model)]
        model.eval()
        with torch.no_grad():
            model(data[0][0])
            for module in layers(model):
                score = module.weight.abs().flatten(1) * squares[module].sqrt()
                order = score.sort(dim=1, stable=True).indices[:, : int(score.shape[1] * AMOUNT)]
                module.weight.view(len(score), -1).scatter_(1, order, 0)
        for handle in handles:
            handle.remove()

    return run


def two_of_four(model: nn.Module) -> None:
    """The two smallest of every four by topk."""
    with torch.no_grad():
        for module in layers(model):
            if module.weight.shape[1] % 4 == 0:
                moved = module.weight.movedim(1, -1).contiguous()
                groups = moved.view(-1, 4)
                groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0)
                module.weight.copy_(moved.movedim(-1, 1))


def structured(data: Data) -> Run:
    """torch-pruning's own pruner."""

    def run(model: nn.Module) -> None:
        ignored = [module for module in model.modules() if isinstance(module, nn.Linear)]
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        tp.pruner.BasePruner(
            model.eval(), data[0][0][:1], importance, pruning_ratio=AMOUNT, ignored_layers=ignored
        ).step()

    return run


def alternatives(data: Data) -> dict[str, tuple[str, Run | None]]:
    """For each pruner the public way, and what it is."""
    product = by_gradient(lambda w, g: (w * g).abs(), data)
    plain = "plain scores + torch.nn.utils.prune.global_unstructured"
    return {
        "magnitude": ("torch.nn.utils.prune.global_unstructured", globally),
        "layer-magnitude": (
            "torch.nn.utils.prune.l1_unstructured",
            lambda model: [torch_prune.l1_unstructured(m, "weight", AMOUNT) for m in layers(model)] and None,
        ),
        "random": (
            "torch.nn.utils.prune.global_unstructured",
            lambda model: globally(model, method=torch_prune.RandomUnstructured),
        ),
        "lamp": (plain, lamp),
        "gradient": (plain, product),
        "snip": (plain, product),
        "taylor": (plain, by_gradient(lambda w, g: (w * g).square(), data)),
        "grasp": (plain, grasp(data)),
        "synflow": (f"{plain} (one round)", synflow(data)),
        "wanda": ("unfold + a sort of each row", wanda(data)),
        "nm": ("topk of every four", two_of_four),
        "lookahead": ("none that follows a ResNet's graph", None),
        "synaptic-stripping": ("none", None),
        "structured-magnitude": ("torch_pruning.BasePruner", structured(data)),
    }


def ours(name: str, data: Data) -> Run:
    """One call of this project's pruner."""
    rounds = 1 if name == "synflow" else None

    def run(model: nn.Module) -> None:
        options = {"amount": AMOUNT} if name != "nm" else {}
        pruners.create(name, rounds=rounds).prune(model, Masks(model), batches=data, loss_fn=F.cross_entropy, **options)

    return run


def main() -> None:
    parser = arguments(__doc__, rounds=3, quick_rounds=1)
    parser.add_argument("--only", nargs="*", default=None, metavar="PRUNER")
    options = parse(parser)
    warnings.simplefilter("ignore")  # layers that nm leaves whole
    original = (recipes.models.create("resnet20") if options.quick else resnet50()).to(options.device)
    name = "ResNet-20" if options.quick else "ResNet-50"
    images = torch.randn(4, 3, 64, 64, device=options.device)
    data = [(images, torch.randint(0, 10, (4,), device=options.device))]
    rows: list[Row] = []
    for pruner, (what, other) in alternatives(data).items():
        if options.only and pruner not in options.only:
            continue
        mine = f"pruners: {pruner}"
        candidates = {mine: ours(pruner, data)} | ({what: other} if other is not None else {})
        reference = what if other is not None else mine
        rows += compare(
            candidates,
            reference,
            rounds=options.rounds,
            device=options.device,
            setting=f"`{pruner}`, {name}",
            memory=True,
            fresh=lambda: copy.deepcopy(original),
        )
    save(
        options.json,
        title="One call of each pruner",
        about=f"20 % of a fresh {name} (`nm`: half); data-driven ones see four images of 64 × 64. “Plain scores” are "
        "the same scores in the fewest lines of PyTorch, for want of a published package with them. torch-pruning's "
        "own step is a part of `structured-magnitude`, which also finds out which channels can go, counts exactly, and "
        "takes masks, gradients and optimizer states along.",
        machine=machine(options.device),
        rows=rows,
    )


if __name__ == "__main__":
    main()
